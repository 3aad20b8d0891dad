// SPDX-License-Identifier: Apache-2.0
//
// Names of the files of a checkpoint, and what they say.

#ifndef DSD_FRONTENDS_CHECKPOINT_FILE_NAMES_H_
#define DSD_FRONTENDS_CHECKPOINT_FILE_NAMES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "dsd/core/base/env.h"

namespace dsd::checkpoint {

inline constexpr char kIndexFile[] = ".metadata";
// Of a checkpoint in which each rank has an index of its own.
inline constexpr char kFirstRankIndexFile[] = "__0.metadata";
inline constexpr char kSafetensorsSuffix[] = ".safetensors";
inline constexpr char kSafetensorsIndexSuffix[] = ".safetensors.index.json";

// Key of `__metadata__` under which all safetensors files of a save have its
// id.
inline constexpr char kSaveIdAttribute[] = "dsd_save_id";

// ... and under which each of them has the digests of its tensors.
inline constexpr char kDigestsAttribute[] = "dsd_digests";

// "directory/name".
std::string JoinFile(const std::string& directory, absl::string_view name);

// The directory that has `path`: "a/b" of "a/b/c" and "a/b/c/", "." of "a".
std::string ParentOf(const std::string& path);

// `path` and the directories above it that are not there, innermost first.
std::vector<std::string> MissingDirectories(FileSystem& files,
                                            const std::string& path);

// What is after the last slash.
absl::string_view LastPart(absl::string_view path);

// A name beside `name` under which it is written until it is complete; and the
// inverse, "" for names that are none of these.
std::string TemporaryFile(absl::string_view name, absl::string_view file_id);
absl::string_view NameOfTemporary(absl::string_view temporary);

// A UUID4 text from 128 random bits, as Python's save ids are.
std::string MakeSaveId(uint64_t random_high, uint64_t random_low);

// The part of a save id that is in file names; "" if it is no such id.
std::string FileId(absl::string_view save_id);

std::string DataFile(int rank, int number, absl::string_view file_id);
std::string DigestsFile(absl::string_view file_id);
std::string TemporaryIndexFile(absl::string_view file_id);

// The rank whose own index has this name ("__<rank>.metadata", which Python
// writes without collectives); nullopt for other names.
std::optional<int> RankOfIndex(absl::string_view name);

// The id in the name of a data file that dsd wrote, "" for other names.
absl::string_view IdOfDataFile(absl::string_view name);

// Names that saves make and leave behind when they are replaced or interrupted:
// data files of Python and dsd, digests, temporary indexes, indexes of ranks.
bool IsCheckpointFile(absl::string_view name);

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_FILE_NAMES_H_
