// SPDX-License-Identifier: Apache-2.0
//
// One save, in the steps that a save in the foreground and one in the
// background have in common.

#ifndef DSD_FRONTENDS_CHECKPOINT_SAVE_JOB_H_
#define DSD_FRONTENDS_CHECKPOINT_SAVE_JOB_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/data_file_writer.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"
#include "dsd/frontends/checkpoint/digests_file.h"
#include "dsd/frontends/checkpoint/live_state.h"
#include "dsd/frontends/checkpoint/output_directory.h"

namespace dsd::checkpoint {

// What saves of states with equal catalogs and paths have in common on one
// rank. Immutable.
struct SavePlan {
  Digest fingerprint;
  Catalog catalog;
  std::vector<Path> tensor_paths;
  std::vector<Piece> pieces;
  int64_t payload_bytes = 0;  // of all pieces
};

// Begin, then perhaps Snapshot, then Finish, each once. Thread-compatible.
class SaveJob {
 public:
  SaveJob(const std::string& directory, Communicator* comm,
          const SaveOptions& options);
  // Of what was begun nothing is left, unless it was committed.
  ~SaveJob();

  // Everything that can fail without having written anything but the directory,
  // and the agreement of all ranks. `*plan` is used if it is that of an equal
  // state, and replaced if not. Collective; all ranks get the same verdict.
  // `before`: what was wrong on this rank already.
  absl::Status Begin(const absl::Status& before, const State& state,
                     std::shared_ptr<const SavePlan>* plan);

  // Bytes that Snapshot takes: what this rank stores.
  int64_t snapshot_bytes() const { return plan_->payload_bytes; }

  // Copies what this rank stores to `memory`, which stays until Finish. Then
  // `tensors` is not used any more. An error is for Finish, to tell all ranks.
  absl::Status Snapshot(Endpoint* tensors, absl::Span<std::byte> memory);

  // Writes and commits. `local`: what went wrong on this rank since Begin.
  // `tensors`: those of the state, null if there are none or after Snapshot.
  // Collective; all ranks get the same verdict.
  absl::StatusOr<SaveReport> Finish(const absl::Status& local,
                                    Endpoint* tensors);

 private:
  // What a rank wrote, as rank 0 learns of it.
  struct ChunkRecord {
    size_t tensor;
    Box box;
    int64_t offset;
    int64_t length;
  };
  struct ObjectRecord {
    Path path;
    Digest128 digest;
    int64_t offset;
    int64_t length;
  };
  struct RankRecord {
    bool failed = true;
    int64_t file_bytes = 0;  // 0: no file
    int64_t payload_bytes = 0;
    std::vector<ChunkRecord> chunks;
    std::vector<ObjectRecord> objects;
    std::vector<std::pair<size_t, Digest128>> digests;  // partial, by tensor
  };
  // An object that this rank stores.
  struct EncodedObject {
    Path path;
    std::string stored;
  };

  static std::string Encode(const RankRecord& record);
  static absl::StatusOr<RankRecord> Decode(absl::string_view bytes,
                                           const Catalog& catalog);

  std::string InDirectory(absl::string_view name) const;
  absl::Status Prepare(const State& state, const Digest& fingerprint,
                       std::vector<std::string>* encoded,
                       std::shared_ptr<const SavePlan>* plan);
  absl::Status ClaimDirectory();
  absl::StatusOr<SaveReport> WriteAndCommit(const absl::Status& begun,
                                            Endpoint* tensors);
  CallOptions CommOptions() const;
  absl::Status Broadcast(absl::Span<int64_t> numbers);
  absl::Status ChooseId();
  // Of this rank's file, with these archives of its objects.
  int64_t LengthOfData(const std::vector<std::string>& objects);
  int64_t BytesOf(const Piece& piece) const;
  absl::Status WriteData(Endpoint* tensors);
  absl::Status WritePiece(const Piece& piece, Endpoint* tensors,
                          const std::byte* snapshot, DataFileWriter* out);
  // Rank 0, when all ranks' data is on storage.
  absl::Status Commit(const std::vector<std::string>& blobs);
  absl::Status CheckFiles(const std::vector<RankRecord>& records,
                          dcp::Metadata* index);
  absl::Status FillIndex(const std::vector<RankRecord>& records,
                         dcp::Metadata* index, StoredDigests* digests);
  absl::Status WriteIndex(const dcp::Metadata& index, const std::string& path,
                          StoredDigests* digests);
  // After a rename that reported an error.
  bool IsInPlace(const StoredDigests& digests, const std::string& temporary);
  void RemoveOldFiles();
  void RemoveOwnFiles();
  absl::Status Undecided(const absl::Status& status);

  const std::string directory_;
  Communicator* const comm_;
  const SaveOptions options_;
  Env& env_;
  FileSystem& files_;
  const Deadline deadline_;
  const int rank_;
  const int size_;
  const std::string what_;

  std::shared_ptr<const SavePlan> plan_;
  std::vector<EncodedObject> objects_;
  bool in_background_ = false;
  const std::byte* snapshot_ = nullptr;
  OutputDirectory output_;
  std::vector<std::string> old_files_;  // on rank 0
  std::string save_id_;
  std::string id_;
  RankRecord record_;
  std::vector<std::string> own_files_;
  int64_t bytes_done_ = 0;
  dcp::TensorArchives archives_;
  absl::flat_hash_map<int, uint32_t> file_of_rank_;
  bool committed_ = false;
  SaveReport report_;
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_SAVE_JOB_H_
