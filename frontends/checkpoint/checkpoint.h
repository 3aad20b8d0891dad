// SPDX-License-Identifier: Apache-2.0
//
// Checkpoints: written in the format of torch.distributed.checkpoint (DCP), a
// directory that Python's `dcp.load` opens; read in every Format.
//
// What lies in the directory of a DCP checkpoint:
//   .metadata                       the index; its presence is the commit
//   __<rank>_<n>_<id>.distcp        data, new names for every save
//   .dsd_digests_<id>               content digests; Python ignores it
// <id> is the first 16 digits of the save id that .metadata records, so an
// index and digests of different saves never meet.

#ifndef DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_H_
#define DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/plan/catalog.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/core/value/flatten.h"
#include "dsd/core/value/value.h"

namespace dsd::checkpoint {

// What a checkpoint is stored as.
enum class Format {
  // A directory with `.metadata`.
  kDcp,
  // A safetensors file, or a directory of them: those that its
  // `*.safetensors.index.json` names, all if it has none (Hugging Face; shards
  // of torch.distributed.checkpoint, with their DCP_SHARDING_INFO).
  kSafetensors,
  // An archive of torch.save (1.6 or newer), of nested dicts and lists.
  kTorchArchive,
};

// "dcp", "safetensors", "torch".
absl::string_view FormatName(Format format);

// The inverse of FormatName; nullopt for an unknown name.
std::optional<Format> ParseFormat(absl::string_view name);

// A value that is not a tensor. Its key is JoinPath(path).
struct ObjectEntry {
  Path path;
  Object value;
};

// One side of a save or load: what a job has, by key. Keys are unique over
// tensors and objects.
struct State {
  // This rank's part of the tensors; its catalog is the same on all ranks, the
  // names in it are the keys. Not owned; null: no tensors.
  Endpoint* tensors = nullptr;

  // Where each tensor of the catalog lies in the nested state dict, so that
  // Python rebuilds the nesting. JoinPath(tensor_paths[i]) is the name of
  // tensor i. Empty: each name is one path segment.
  std::vector<Path> tensor_paths;

  // For each tensor of the catalog the first one that it is, as tied weights
  // are; itself if it is the first. Empty: each is its own. An archive of
  // torch.save has such tensors once; nothing else heeds it.
  std::vector<size_t> same_as;

  // Of the nested state dict, for an archive of torch.save; nothing else heeds
  // it.
  Nesting nesting;

  std::vector<ObjectEntry> objects;
};

// Which checkpoints of a series (see steps.h) stay: the newest `keep_last`, and
// those whose number is a multiple of `keep_every`.
struct Retention {
  int64_t keep_last = 0;   // 0: all
  int64_t keep_every = 0;  // 0: none besides the newest
};

struct SaveOptions {
  CallOptions call;
  // Whether a checkpoint that is in the directory may be replaced.
  bool overwrite = true;
  // The directory's name ends in a number, such as "/runs/7/step-500", and it
  // is one of a series: after the commit "/runs/7/step-latest" names it, and
  // older ones that are not to stay are removed.
  std::optional<Retention> retention;
  // Null: the communicator's, or Env::Real() without one.
  Env* env = nullptr;
};

struct SaveReport {
  std::string save_id;
  int64_t tensors = 0;
  int64_t objects = 0;
  int64_t chunks = 0;             // stored boxes, over all ranks
  int64_t payload_bytes = 0;      // tensor bytes written by this rank
  int64_t payload_bytes_all = 0;  // ... by all ranks
  int64_t file_bytes_all = 0;     // length of all data files
  // Files of earlier saves that could not be removed. Harmless.
  std::vector<std::string> leftovers;  // on rank 0
  std::vector<std::string> pruned;     // directories, by retention; on rank 0
};

// Writes `state` to `directory`, which is made if missing. Each tensor element
// and each object is written once, by one rank that has it. Collective: all
// ranks of `comm` must call it with the same directory, catalog, paths and
// options; null `comm`: a world of one. Objects of one key must be equal on all
// ranks that have it; ranks may lack it (per-rank objects have keys of their
// own).
//
// Absent or complete: data first, then the index by an atomic rename,
// everything synced to stable storage. On an error before that, on any rank,
// all ranks get an error and remove what they wrote, and a checkpoint that was
// there before stays as it was. If a rank dies between, survivors leave their
// new files: the next save removes them. After the commit, files of earlier
// saves are removed.
//
// Errors: InvalidArgument (bad keys or paths, an object of unknown class);
// AlreadyExists (a checkpoint is there and overwrite is off);
// FailedPrecondition (ranks disagree; an element has no holder; rank 0 does not
// see a file that another rank wrote); ResourceExhausted (disk full); what
// files and `comm` report. The text names rank, file and key.
absl::StatusOr<SaveReport> Save(const std::string& directory,
                                const State& state,
                                Communicator* comm = nullptr,
                                const SaveOptions& options = {});

// Saves of a job, one after another. Keeps what they have in common: the plan,
// as long as catalog and paths stay the same, and memory for saves in the
// background. Thread-compatible, but for Cancel, progress and running, which
// may come from any thread. Save, Start and Wait are collective.
class Saver {
 public:
  // Collective over `comm`, which must outlive the Saver; null: a world of one.
  // `name`: of the lane that it opens, new in this group. Null `env`: as in
  // SaveOptions. Errors: of Communicator::OpenLane.
  static absl::StatusOr<std::unique_ptr<Saver>> Create(
      Communicator* comm = nullptr, const std::string& name = "dsd_save",
      Env* env = nullptr);

  // Cancels what is under way and waits for its end.
  ~Saver();

  // The lane; null in a world of one.
  Communicator* comm() const;

  // As the function of this name, after a save in the background has ended.
  absl::StatusOr<SaveReport> Save(const std::string& directory,
                                  const State& state,
                                  const SaveOptions& options = {});

  // Begins a save and returns as soon as what this rank stores has been copied:
  // from then on `state` and what it refers to may change. The rest happens in
  // a thread of its own, from which options.call.progress is called, too;
  // options.call.timeout counts for all of it. options.call.cancel and
  // options.env are not used (Cancel, Create). The copy is kept for the next
  // save: as much memory as this rank stores bytes.
  //
  // One save is under way at a time: an earlier one is waited for, and if it
  // failed and nobody has asked with Wait, its error is returned by this call,
  // on all ranks, and nothing begins. Errors: those of Save that are found
  // before anything is written; later ones are Wait's.
  absl::Status Start(const std::string& directory, const State& state,
                     const SaveOptions& options = {});

  // Waits for the save that was started last and returns how it ended, each
  // time it is called. FailedPrecondition if there is none; Cancelled and
  // DeadlineExceeded for `options`, then it goes on.
  absl::StatusOr<SaveReport> Wait(const CallOptions& options = {});

  // Waits as Wait, and leaves it to Wait or the next save to say how it ended.
  absl::Status AwaitEnd(const CallOptions& options = {});

  // Of this rank's bytes of the save that was started last.
  Progress progress() const;
  bool running() const;

  // Ends the save in the background, on all ranks, with Cancelled: what was in
  // the directory stays. Once all ranks have written their part it is too late.
  void Cancel();

 private:
  struct Impl;
  explicit Saver(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct LoadOptions {
  CallOptions call;
  // Keys of the target that the checkpoint lacks: an error, or left as they
  // are.
  bool allow_missing = false;
  // Keys of the checkpoint that the target lacks: an error, or ignored.
  bool allow_unexpected = false;
  // Under which key of the checkpoint a key of the target is stored: to rename,
  // or to take a part, `[](absl::string_view key) { return
  // absl::StrCat("model.", key); }`. Of keys that it gives nullopt for nothing
  // is loaded. The same on all ranks; two keys of the target may not have one
  // stored key. Empty: all are stored under their own.
  std::function<std::optional<std::string>(absl::string_view key)> stored_key;
  // Of tensors that are stored with another dtype: an error, or, with kCast,
  // converted as Tensor::copy_ does it, between the dtypes that CastFloats has.
  // Digests are those of what is stored.
  DTypePolicy dtype_policy = DTypePolicy::kDefault;
  // Whether what is read is compared with the digests that dsd stores in every
  // format. Checkpoints written by Python have none: there the CRCs of those
  // records are compared that one rank reads as a whole.
  bool verify = true;
  Env* env = nullptr;  // as in SaveOptions
};

struct LoadReport {
  std::string save_id;
  // Tensor bytes read from storage, by this rank and by all. Each stored byte
  // is read by one rank, unless a rank needs very short pieces of many rows
  // (under 512 bytes each): those are read with what lies between.
  int64_t payload_bytes = 0;
  int64_t payload_bytes_all = 0;
  int64_t bytes_sent = 0;  // to other ranks, by this one
  int64_t bytes_sent_all = 0;
  bool verified = false;  // all of it was compared with stored digests
  int64_t cast = 0;       // tensors that were stored with another dtype
  // Sorted; only if allowed: keys of the target, and of the checkpoint.
  std::vector<std::string> missing;
  std::vector<std::string> unexpected;
};

// Fills the tensors of `target` and replaces the values of target.objects from
// the checkpoint at `path`, of any Format, whatever the number of ranks that
// wrote it.
// Each stored byte is read once and sent to the ranks that need it. Collective,
// as Save.
//
// Missing and unexpected keys, differing shapes, dtypes and kinds are found and
// all listed before anything live changes. After a later error (a file that
// cannot be read, a digest that differs) the tensors are unspecified; the text
// says so. Objects change only on success. Every rank gets the same verdict.
//
// Errors: InvalidArgument (kKeep); NotFound (no checkpoint, or not complete:
// says which); DataLoss
// (bytes that do not decode or verify: names key and file); FailedPrecondition
// (mismatch of keys, shapes or dtypes; ranks see different checkpoints);
// Unimplemented (transformed or quantized items); what files and `comm` report.
absl::StatusOr<LoadReport> Load(const std::string& path, State& target,
                                Communicator* comm = nullptr,
                                const LoadOptions& options = {});

class Checkpoint;

// The same from a checkpoint that every rank has open. options.verify and
// options.env are not used: they are those of Checkpoint::Open.
absl::StatusOr<LoadReport> Load(std::shared_ptr<const Checkpoint> checkpoint,
                                State& target, Communicator* comm = nullptr,
                                const LoadOptions& options = {});

struct OpenOptions {
  bool verify = true;      // as in LoadOptions
  Env* env = Env::Real();  // must outlive the Checkpoint
};

// What storage was asked for. Thread-compatible.
struct ReadStats {
  int64_t payload_bytes = 0;   // tensor elements
  int64_t overhead_bytes = 0;  // archive headers, directories, objects
};

// A box of a tensor in a file.
struct StoredChunk {
  Box box;
  std::string file;
  // Of the archive in the file (DCP), of the elements (safetensors), of the
  // storage that has them (torch.save).
  int64_t offset_bytes = 0;
  int64_t length_bytes = 0;
};

struct StoredObject {
  std::string key;
  Path path;
  std::string file;
  // Of the archive that has it: its own (DCP), that of all (torch.save).
  int64_t offset_bytes = 0;
  int64_t length_bytes = 0;
};

// The elements of stored tensors, all on kAnyHolder; Write is Unimplemented.
// With verification on it keeps, of each tensor, the digest of the elements
// that were read, so that ranks that read parts can check the whole together.
// Each element is to be read once for that. Read converts between the dtypes of
// CastFloats.
class CheckpointEndpoint : public Endpoint {
 public:
  virtual ReadStats stats() const = 0;

  // What this endpoint knows of tensors that it read in part, to be given to
  // Merge of endpoints of the same keys on other ranks.
  virtual std::string Partials() const = 0;
  virtual absl::Status Merge(absl::string_view partials) = 0;

  // Compares the tensors that were read as a whole, here or together with what
  // was merged. DataLoss names keys and files. Returns how many were compared.
  virtual absl::StatusOr<int64_t> Verify() = 0;
};

// An open checkpoint: its index, decoded. Pickle is never executed: known
// classes become plain data, others are inert. Immutable; thread-safe.
class Checkpoint : public std::enable_shared_from_this<Checkpoint> {
 public:
  struct Impl;  // of this package

  // Errors: as Load.
  // Its Format is known from what is at `path`, names of files count only to
  // find those of a directory.
  static absl::StatusOr<std::shared_ptr<const Checkpoint>> Open(
      const std::string& path, const OpenOptions& options = {});
  ~Checkpoint();

  Format format() const;
  const std::string& path() const;       // as given to Open
  const std::string& directory() const;  // where the files lie
  const std::string& save_id() const;    // "" if not recorded
  const Digest& fingerprint() const;     // covers the bytes of the index

  // All tensors of a dtype known here, in the order of the index. Layouts have
  // one box per chunk, on kAnyHolder.
  const Catalog& catalog() const;
  const Path& tensor_path(size_t tensor) const;
  std::vector<StoredChunk> Chunks(size_t tensor) const;

  // As State::same_as: what is one view of one storage in an archive of
  // torch.save. Empty for other formats.
  const std::vector<size_t>& same_as() const;

  // As State::nesting: of an archive of torch.save.
  const Nesting& nesting() const;

  // Tensors of other dtypes (quantized, sub-byte) and kinds (sparse): key and
  // the file's name of the dtype or kind. They are listed, and cannot be read.
  const std::vector<std::pair<std::string, std::string>>& unreadable() const;

  const std::vector<StoredObject>& objects() const;

  // What the file says about itself: `__metadata__` of safetensors. Sorted by
  // key.
  const std::vector<std::pair<std::string, std::string>>& attributes() const;

  // Reads and decodes one object; classes that are not plain data give Opaque.
  absl::StatusOr<Object> ReadObject(size_t object) const;

  // Whether dsd wrote it and its digests are used.
  bool has_digests() const;
  // The stored content digest of a key; nullopt if there is none. Old
  // checkpoints have digests of 64 bits (digest_version), whose high half is 0.
  DigestVersion digest_version() const;
  std::optional<Digest128> StoredDigest(absl::string_view key) const;

  // An endpoint over the tensors named, in the order given; all of the catalog
  // without names. Keeps the checkpoint. NotFound for a key that is not there.
  absl::StatusOr<std::unique_ptr<CheckpointEndpoint>> MakeEndpoint() const;
  absl::StatusOr<std::unique_ptr<CheckpointEndpoint>> MakeEndpoint(
      absl::Span<const std::string> keys) const;

 private:
  friend class CheckpointInternals;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// A problem found in a checkpoint.
struct Problem {
  std::string key;   // "" if it concerns a file
  std::string file;  // "" if it concerns the index
  absl::Status status;
};

struct VerifyReport {
  int64_t tensors = 0;
  int64_t objects = 0;
  int64_t chunks = 0;
  int64_t bytes = 0;     // read
  int64_t compared = 0;  // keys whose stored digest was compared
  std::vector<Problem> problems;
  // Data files that the index does not name. Harmless.
  std::vector<std::string> unreferenced;
};

// Reads every slice of every file and checks archive, CRCs, pickles, agreement
// of dtype and shape with the index, coverage and digests. Goes on after a
// problem. `progress` is called now and then, with bytes of elements.
VerifyReport Verify(
    const Checkpoint& checkpoint,
    const std::function<void(const Progress&)>& progress = nullptr);

// Content digests of what is stored: the same for equal values, whatever the
// layout, the number of files and the program that wrote them.
struct KeyDigest {
  std::string key;
  Digest128 digest;
};
struct CheckpointDigests {
  std::vector<KeyDigest> keys;  // sorted by key
  Digest128 whole;              // over all keys and their digests
};
absl::StatusOr<CheckpointDigests> ComputeDigests(
    const Checkpoint& checkpoint,
    const std::function<void(const Progress&)>& progress = nullptr);

// The content digests of the tensors of a live State and of its objects.
// Collective, as Save; equal to what ComputeDigests gives for the saved state.
absl::StatusOr<CheckpointDigests> ComputeDigests(
    const State& state, Communicator* comm = nullptr,
    const CallOptions& options = {});

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_H_
