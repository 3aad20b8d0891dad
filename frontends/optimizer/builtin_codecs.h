// SPDX-License-Identifier: Apache-2.0
//
// The codecs that are always there, one file each.

#ifndef DSD_FRONTENDS_OPTIMIZER_BUILTIN_CODECS_H_
#define DSD_FRONTENDS_OPTIMIZER_BUILTIN_CODECS_H_

#include <memory>

#include "dsd/frontends/optimizer/codec.h"

namespace dsd {

std::unique_ptr<const OptimizerCodec> MakeSgdCodec();
std::unique_ptr<const OptimizerCodec> MakeAdamCodec();
std::unique_ptr<const OptimizerCodec> MakeAdamWCodec();
std::unique_ptr<const OptimizerCodec> MakeAdagradCodec();
std::unique_ptr<const OptimizerCodec> MakeRmspropCodec();
std::unique_ptr<const OptimizerCodec> MakeLbfgsCodec();

}  // namespace dsd

#endif  // DSD_FRONTENDS_OPTIMIZER_BUILTIN_CODECS_H_
