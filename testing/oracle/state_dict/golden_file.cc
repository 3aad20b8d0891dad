// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/oracle/state_dict/golden_file.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "dsd/core/base/status_macros.h"
#include "libdeflate.h"

namespace dsd::oracle {
namespace {

absl::StatusOr<std::string> Unpack(const std::string& packed) {
  if (packed.size() < 18) return absl::DataLossError("not a gzip file");
  // The file ends with the size of what is in it.
  uint32_t size;
  std::memcpy(&size, packed.data() + packed.size() - sizeof(size),
              sizeof(size));
  std::string text(size, '\0');
  const std::unique_ptr<libdeflate_decompressor,
                        decltype(&libdeflate_free_decompressor)>
      decompressor(libdeflate_alloc_decompressor(),
                   &libdeflate_free_decompressor);
  if (libdeflate_gzip_decompress(decompressor.get(), packed.data(),
                                 packed.size(), text.data(), text.size(),
                                 nullptr) != LIBDEFLATE_SUCCESS) {
    return absl::DataLossError("the gzip file is damaged");
  }
  return text;
}

std::vector<std::pair<std::string, std::string>> Assignments(
    absl::Span<const std::string> words) {
  std::vector<std::pair<std::string, std::string>> out;
  for (const std::string& word : words) {
    out.push_back(absl::StrSplit(word, absl::MaxSplits('=', 1)));
  }
  return out;
}

}  // namespace

std::string Configuration::ToString() const {
  return absl::StrCat("configuration ", number, ": ",
                      absl::StrJoin(axes, " ", absl::PairFormatter("=")));
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in.good()) return absl::NotFoundError(path);
  std::string text{std::istreambuf_iterator<char>(in),
                   std::istreambuf_iterator<char>()};
  if (!absl::EndsWith(path, ".gz")) return text;
  absl::StatusOr<std::string> unpacked = Unpack(text);
  DSD_RETURN_IF_ERROR(unpacked) << path;
  return unpacked;
}

absl::StatusOr<GoldenFile> ParseGoldenFile(absl::string_view text) {
  // Blocks come last: until then results are numbers of blocks.
  struct Use {
    size_t configuration;
    std::vector<Outcome> Configuration::*list;
    std::string model;
    std::string optimizers;
  };
  GoldenFile file;
  std::vector<Use> uses;
  absl::flat_hash_map<std::string, Lines> blocks;
  Lines* block = nullptr;
  int line_number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++line_number;
    if (absl::ConsumePrefix(&line, "|")) {
      if (block == nullptr) {
        return absl::DataLossError(
            absl::StrCat("line ", line_number, " is in no block"));
      }
      block->emplace_back(line);
      continue;
    }
    const std::vector<std::string> words =
        absl::StrSplit(line, ' ', absl::SkipEmpty());
    if (words.empty() || words[0] == "#") continue;
    const auto rest = absl::MakeConstSpan(words).subspan(1);
    if (words[0] == "model" && rest.size() >= 2) {
      file.models[rest[0]].push_back(absl::StrJoin(rest.subspan(1), " "));
    } else if (words[0] == "optimizer" && rest.size() >= 2) {
      OptimizerSpec& spec = file.optimizers[rest[0]];
      const auto values = rest.subspan(2);
      if (rest[1] == "class" && !values.empty()) {
        spec.kind = values[0];
      } else if (rest[1] == "state") {
        spec.entries.assign(values.begin(), values.end());
      } else {
        spec.hyperparameters[rest[1]] = Assignments(values);
      }
    } else if (words[0] == "config" && rest.size() >= 2) {
      Configuration& c = file.configurations.emplace_back();
      c.number = static_cast<int>(file.configurations.size()) - 1;
      for (auto& [axis, value] : Assignments(rest.subspan(1))) {
        c.axes[axis] = value;
      }
    } else if (rest.size() == 3 && !file.configurations.empty() &&
               (words[0] == "get" || words[0] == "set" || words[0] == "path")) {
      uses.push_back({file.configurations.size() - 1,
                      words[0] == "get"   ? &Configuration::get
                      : words[0] == "set" ? &Configuration::set
                                          : &Configuration::path,
                      rest[1], rest[2]});
    } else if (words[0] == "block" && rest.size() == 1) {
      block = &blocks[rest[0]];
    } else {
      return absl::DataLossError(
          absl::StrCat("line ", line_number, " is unknown: ", line));
    }
  }
  // Ranks are in order.
  for (const Use& use : uses) {
    if (!blocks.contains(use.model) || !blocks.contains(use.optimizers)) {
      return absl::DataLossError(absl::StrCat("no block ", use.model,
                                              " or no block ", use.optimizers));
    }
    (file.configurations[use.configuration].*use.list)
        .push_back({blocks[use.model], blocks[use.optimizers]});
  }
  return file;
}

}  // namespace dsd::oracle
