// The operators of attention, under the name that csrc/registration.cpp includes.
#pragma once

#include "attention/op.h"
