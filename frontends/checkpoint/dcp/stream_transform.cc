// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/stream_transform.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "dsd/core/base/status_macros.h"
#include "zstd.h"

namespace dsd::dcp {
namespace {

// "name[@local-domain][/version]", where minor versions do not matter.
bool IsZstd(absl::string_view descriptor) {
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(descriptor, absl::MaxSplits('/', 1));
  const absl::string_view major =
      parts.second.substr(0, parts.second.find('.'));
  return parts.first == "stream.zstd" && major == "1";
}

absl::StatusOr<std::string> DecodeZstd(absl::string_view bytes,
                                       int64_t max_bytes) {
  const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(
      ZSTD_createDCtx(), &ZSTD_freeDCtx);
  if (context == nullptr) {
    return absl::ResourceExhaustedError("no memory to decode zstd");
  }
  std::string out;
  ZSTD_inBuffer in = {bytes.data(), bytes.size(), 0};
  // 0: a frame has just ended. An item may be several frames.
  size_t more = 1;
  while (in.pos < in.size || more != 0) {
    if (static_cast<int64_t>(out.size()) > max_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("zstd: it decodes to more than ", max_bytes, " bytes"));
    }
    const size_t begin = out.size();
    // Grows with what comes out, whatever the frame announces.
    out.resize(begin + std::max<size_t>(ZSTD_DStreamOutSize(), begin / 2));
    ZSTD_outBuffer to = {out.data() + begin, out.size() - begin, 0};
    const size_t before = in.pos;
    more = ZSTD_decompressStream(context.get(), &to, &in);
    out.resize(begin + to.pos);
    if (ZSTD_isError(more)) {
      return absl::DataLossError(
          absl::StrCat("zstd: ", ZSTD_getErrorName(more)));
    }
    if (more != 0 && in.pos == in.size && in.pos == before && to.pos == 0) {
      return absl::DataLossError("zstd: the item ends early (truncated?)");
    }
  }
  return out;
}

}  // namespace

absl::Status CheckTransforms(absl::string_view descriptors) {
  for (const absl::string_view descriptor : absl::StrSplit(descriptors, ", ")) {
    if (!IsZstd(descriptor)) {
      return absl::UnimplementedError(
          absl::StrCat("stored through \"", absl::CHexEscape(descriptor),
                       "\", which is not supported"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> DecodeStream(absl::string_view descriptors,
                                         absl::string_view bytes,
                                         int64_t max_bytes) {
  DSD_RETURN_IF_ERROR(CheckTransforms(descriptors));
  std::string decoded;
  // In the order of reading.
  for (const absl::string_view descriptor : absl::StrSplit(descriptors, ", ")) {
    (void)descriptor;  // there is one kind
    DSD_ASSIGN_OR_RETURN(std::string next, DecodeZstd(bytes, max_bytes));
    decoded = std::move(next);
    bytes = decoded;
  }
  return decoded;
}

}  // namespace dsd::dcp
