// The torch-free interface of attention, under the name that the engines include.
#pragma once

#include "../attention/types.h"
