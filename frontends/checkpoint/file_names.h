// SPDX-License-Identifier: Apache-2.0
//
// Names of the files of a checkpoint, and what they say.

#ifndef DSD_FRONTENDS_CHECKPOINT_FILE_NAMES_H_
#define DSD_FRONTENDS_CHECKPOINT_FILE_NAMES_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace dsd::checkpoint {

inline constexpr char kIndexFile[] = ".metadata";

// "directory/name".
std::string JoinFile(const std::string& directory, absl::string_view name);

// The directory that a directory is in, by its name.
std::string ParentOf(const std::string& directory);

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
