// Checks of a decoder that a caller gives.
#pragma once

#include "common/device.h"
#include "tango/decode.h"

namespace tango {

constexpr int kDimMultiple = 16;
constexpr int kMaxGroupWidth = 4096;   // of the query heads of a KV head
constexpr int kMaxCapacity = 1 << 20;  // positions of a KV cache
constexpr int kMaxRotation = 1 << 24;  // fp32 has all integers up to it

// Rejects dimensions that no decode kernel takes. Otherwise gives them with one block per SM of the current device
// where they have none, and that device.
int take_shape(const TangoDecodeShape* given, TangoDecodeShape& shape, DeviceProperties& gpu);

// Rejects weights that no decode kernel reads. What belongs to a sequence is not looked at.
int check_weights(const TangoDecodeShape& shape, const TangoDecodeTensors* tensors);

}  // namespace tango
