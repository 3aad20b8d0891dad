// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/fault/sim_seed.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/backends/sim/simulation.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/core/transfer/random_tensors.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/test_state.h"

namespace dsd {
namespace {

using checkpoint::ObjectEntry;
using checkpoint::TestState;
using checkpoint::TestTensor;
using sim::Fault;
using sim::FaultKind;
using sim::Outcome;
using sim::RankOutcome;
using sim::RanksOptions;
using sim::Simulation;
using sim::SimulationOptions;
using test::Random;
using test::Uniform;

constexpr char kDir[] = "/jobs/7/checkpoint";
constexpr absl::Duration kTimeout = absl::Seconds(10);
// Pauses and delays up to here end nothing.
constexpr absl::Duration kHarmless = absl::Milliseconds(900);
// From a death to the error of every survivor.
constexpr absl::Duration kDeathIsKnown = absl::Seconds(2);
// What is wrong whatever has happened.
constexpr absl::string_view kWrong = "WRONG: ";

// Whether `text` speaks of "rank 3" or of "ranks 1, 3".
bool NamesRank(absl::string_view text, int rank) {
  for (size_t at = text.find("rank"); at != text.npos;
       at = text.find("rank", at)) {
    at += 4;
    if (at < text.size() && text[at] == 's') ++at;
    while (at < text.size() && text[at] == ' ') {
      size_t end = ++at;
      while (end < text.size() && absl::ascii_isdigit(text[end])) ++end;
      int named = -1;
      if (absl::SimpleAtoi(text.substr(at, end - at), &named) &&
          named == rank) {
        return true;
      }
      at = end;
      if (at < text.size() && text[at] == ',') ++at;
    }
  }
  return false;
}

// Whether an error is one that the fault brings about; `several`: there were
// others.
bool Explains(const Fault& fault, const absl::Status& status, bool several) {
  const absl::string_view text = status.message();
  const bool gone =
      absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
  switch (fault.kind) {
    case FaultKind::kDeath:
    case FaultKind::kTornWrite:
      return gone && NamesRank(text, fault.rank);
    case FaultKind::kPause:
      return fault.length > kHarmless && gone && NamesRank(text, fault.rank);
    case FaultKind::kDelay:
      // Whoever's time is over first names the rank that it waits for, which
      // may wait in turn.
      return fault.length > kHarmless && gone &&
             absl::StrContains(text, "rank ");
    case FaultKind::kDisconnect:
    case FaultKind::kShortTransfer:
      if (!NamesRank(text, fault.rank) && !NamesRank(text, fault.peer)) {
        return false;
      }
      // An end of the link waits for the store's verdict before it speaks, and
      // another fault may have left the others no time for that.
      return absl::IsDeadlineExceeded(status)
                 ? several
                 : absl::IsUnavailable(status) &&
                       absl::StrContains(text, "was lost");
    case FaultKind::kNoSpace:
      return absl::IsResourceExhausted(status) &&
             absl::StrContains(text, "no space left on device");
    case FaultKind::kIoError:
      return absl::IsUnavailable(status) &&
             absl::StrContains(text, "I/O error");
    case FaultKind::kCorruptByte:
      return true;  // it may be in a header or a length
    case FaultKind::kReorder:
    case FaultKind::kPowerLoss:
      return false;
  }
  return false;
}

// --- Planted bugs ---

class NeverSyncs final : public FileSystem {
 public:
  explicit NeverSyncs(std::unique_ptr<FileSystem> to) : to_(std::move(to)) {}

  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenReadable(
      const std::string& path) override {
    return to_->OpenReadable(path);
  }
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateWritable(
      const std::string& path) override {
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file,
                         to_->CreateWritable(path));
    return std::make_unique<File>(std::move(file));
  }
  absl::Status Rename(const std::string& from, const std::string& to) override {
    return to_->Rename(from, to);
  }
  absl::Status Remove(const std::string& path) override {
    return to_->Remove(path);
  }
  absl::Status CreateDirs(const std::string& path) override {
    return to_->CreateDirs(path);
  }
  absl::StatusOr<std::vector<std::string>> List(
      const std::string& path) override {
    return to_->List(path);
  }
  absl::StatusOr<FileInfo> Stat(const std::string& path) override {
    return to_->Stat(path);
  }
  absl::Status SyncDir(const std::string& path) override {
    return to_->SyncDir(path);
  }

 private:
  class File final : public WritableFile {
   public:
    explicit File(std::unique_ptr<WritableFile> to) : to_(std::move(to)) {}
    absl::Status WriteAt(int64_t offset,
                         absl::Span<const std::byte> data) override {
      return to_->WriteAt(offset, data);
    }
    absl::Status Reserve(int64_t bytes) override { return to_->Reserve(bytes); }
    absl::Status Sync() override { return absl::OkStatus(); }
    absl::Status Close() override { return to_->Close(); }

   private:
    const std::unique_ptr<WritableFile> to_;
  };

  const std::unique_ptr<FileSystem> to_;
};

class DeafStore final : public ForwardingStore {
 public:
  using ForwardingStore::ForwardingStore;
  absl::StatusOr<std::unique_ptr<Membership>> Join(
      const MemberOptions& options, absl::Time deadline) override {
    MemberOptions deaf = options;
    deaf.on_failure = [](const absl::Status&) {};
    return to_->Join(deaf, deadline);
  }
};

class EarlyEngine final : public Engine {
 public:
  explicit EarlyEngine(std::unique_ptr<Engine> to) : to_(std::move(to)) {}
  absl::Status Connect(absl::Time deadline) override {
    return to_->Connect(deadline);
  }
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override {
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<EngineBatch> batch,
                         to_->Start(sends, recvs));
    return std::make_unique<Batch>(std::move(batch));
  }
  void Cancel() override { to_->Cancel(); }

  static absl::StatusOr<std::unique_ptr<Engine>> Create(
      const EngineOptions& options) {
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine,
                         SimBackend().create(options));
    return std::make_unique<EarlyEngine>(std::move(engine));
  }

 private:
  class Batch final : public EngineBatch {
   public:
    explicit Batch(std::unique_ptr<EngineBatch> to) : to_(std::move(to)) {}
    absl::Status Wait(absl::Time deadline) override {
      return to_->Wait(deadline);
    }
    // Payloads stand behind envelopes.
    absl::Status WaitReceived(size_t index, absl::Time deadline) override {
      return index % 2 == 1 ? absl::OkStatus()
                            : to_->WaitReceived(index, deadline);
    }

   private:
    const std::unique_ptr<EngineBatch> to_;
  };

  const std::unique_ptr<Engine> to_;
};

RanksOptions WithBug(PlantedBug bug, int ranks) {
  static constexpr BackendDescriptor kEarly = {
      "sim", kEngineApiVersion, true, false, true, &EarlyEngine::Create};
  RanksOptions options;
  options.connect_timeout = kTimeout;
  switch (bug) {
    case PlantedBug::kNone:
      break;
    case PlantedBug::kRenameBeforeSync:
      options.wrap_files =
          [](int rank,
             std::unique_ptr<FileSystem> files) -> std::unique_ptr<FileSystem> {
        if (rank != 0) return files;
        return std::make_unique<NeverSyncs>(std::move(files));
      };
      break;
    case PlantedBug::kIgnoredVerdict:
      options.wrap_store =
          [ranks](int rank,
                  std::shared_ptr<Store> store) -> std::shared_ptr<Store> {
        if (rank != ranks - 1) return store;
        return std::make_shared<DeafStore>(std::move(store));
      };
      break;
    case PlantedBug::kEarlyReceive:
      options.descriptor = &kEarly;
      break;
  }
  return options;
}

// --- The job ---

CallOptions Call() {
  CallOptions call;
  call.timeout = kTimeout;
  return call;
}

class Job {
 public:
  Job(uint64_t seed, PlantedBug bug)
      : bug_(bug),
        random_(seed),
        simulation_(SimulationOptions::FromSeed(seed)) {}

  SeedResult Run() {
    const int64_t kind = Uniform(random_, 0, 99);
    if (kind < 25) {
      RunCalls();
    } else if (kind < 50) {
      RunRedistribute();
    } else if (kind < 85) {
      RunSave();
    } else {
      RunLoad();
    }
    result_.trace = simulation_.scheduler().trace();
    result_.steps = simulation_.scheduler().steps();
    return std::move(result_);
  }

 private:
  int RandomRanks() {
    const int64_t kind = Uniform(random_, 0, 99);
    if (kind < 60) return static_cast<int>(Uniform(random_, 2, 4));
    if (kind < 98) return static_cast<int>(Uniform(random_, 5, 8));
    return static_cast<int>(Uniform(random_, 9, 64));
  }

  void Fail(absl::string_view what) {
    if (!result_.failure.empty()) return;
    result_.failure = std::string(what);
  }

  // --- Faults ---

  absl::Duration RandomLength() {
    // Microseconds to half a minute, all orders alike.
    return absl::Microseconds(
        std::pow(10.0, Uniform(random_, 0, 7500) / 1000.0));
  }

  // Draws the faults of the next Run after what the last one did.
  void AddFaults() {
    const std::vector<Simulation::RankUse> ranks = simulation_.rank_use();
    const std::vector<Simulation::LinkUse> links = simulation_.link_use();
    const int64_t kind = Uniform(random_, 0, 9);
    const int count = kind == 0 ? 0 : kind <= 7 ? 1 : 2;
    while (static_cast<int>(result_.faults.size()) < count) {
      Fault fault;
      // Where there are files, half of it is about them.
      const bool of_disk = Uniform(random_, 0, 1) == 1;
      fault.kind = static_cast<FaultKind>(
          Uniform(random_, of_disk ? static_cast<int>(FaultKind::kNoSpace) : 0,
                  sim::kNumFaultKinds - 1));
      fault.rank = static_cast<int>(
          Uniform(random_, 0, static_cast<int64_t>(ranks.size()) - 1));
      const Simulation::RankUse& use = ranks[fault.rank];
      int64_t places = 0;
      switch (fault.kind) {
        case FaultKind::kPause:
          fault.length = RandomLength();
          [[fallthrough]];
        case FaultKind::kDeath:
          places = use.places;
          break;
        case FaultKind::kReorder:
          fault.length = absl::Microseconds(Uniform(random_, 1, 20000));
          places = 1;
          break;
        case FaultKind::kDelay:
          fault.length = RandomLength();
          [[fallthrough]];
        case FaultKind::kDisconnect:
        case FaultKind::kShortTransfer:
        case FaultKind::kCorruptByte: {
          if (links.empty()) break;
          const Simulation::LinkUse& link = links[Uniform(
              random_, 0, static_cast<int64_t>(links.size()) - 1)];
          fault.rank = link.from;
          fault.peer = link.to;
          places = link.messages;
          break;
        }
        case FaultKind::kTornWrite:
          places = use.disk_writes;
          break;
        case FaultKind::kNoSpace:
        case FaultKind::kIoError:
        case FaultKind::kPowerLoss:
          places = use.disk_operations;
          break;
      }
      if (places == 0) continue;
      fault.at = Uniform(random_, 0, places - 1);
      simulation_.AddFault(fault);
      result_.faults.push_back(fault);
    }
  }

  bool Fired(FaultKind kind) const {
    return std::any_of(
        result_.faults.begin(), result_.faults.end(),
        [&](const Fault& f) { return f.kind == kind && f.fired > 0; });
  }

  // --- Verdicts ---

  // After a Run without faults.
  bool CheckAllOk(const Outcome& outcome, absl::string_view what) {
    for (const absl::Status& status : outcome.Survivors()) {
      if (!status.ok()) Fail(absl::StrCat(what, ": ", status.ToString()));
    }
    return result_.failure.empty();
  }

  // After one with them; `mischief`: something else, too, and the errors that
  // `explains` holds for come from that.
  void CheckVerdicts(
      const Outcome& outcome, bool mischief = false,
      const std::function<bool(const absl::Status&)>& explains = nullptr) {
    if (!result_.faults.empty()) result_.faults = simulation_.faults();
    if (!outcome.run.ok()) return Fail(outcome.run.ToString());
    const bool corrupt = Fired(FaultKind::kCorruptByte);
    std::optional<absl::StatusCode> code;
    const int64_t fired =
        std::count_if(result_.faults.begin(), result_.faults.end(),
                      [](const Fault& fault) { return fault.fired > 0; });
    for (size_t rank = 0; rank < outcome.ranks.size(); ++rank) {
      const RankOutcome& one = outcome.ranks[rank];
      if (one.died) continue;
      const std::string where =
          absl::StrCat("rank ", rank, ": ", one.status.ToString());
      if (absl::StartsWith(one.status.message(), kWrong)) {
        if (!corrupt) Fail(where);
        continue;
      }
      // With several faults each may have its say.
      if (code.has_value() && *code != one.status.code() && fired == 1 &&
          !corrupt && !mischief) {
        Fail(absl::StrCat("survivors do not agree: ", Statuses(outcome)));
      }
      code = one.status.code();
      if (one.status.ok()) continue;
      const bool explained =
          std::any_of(result_.faults.begin(), result_.faults.end(),
                      [&](const Fault& f) {
                        return f.fired > 0 &&
                               Explains(f, one.status, fired > 1 || mischief);
                      }) ||
          (explains && explains(one.status));
      if (!explained) Fail(absl::StrCat("names no fault: ", where));
      // A death is known at once, not at some deadline.
      const auto death = std::find_if(
          result_.faults.begin(), result_.faults.end(), [](const Fault& f) {
            return f.fired > 0 && (f.kind == FaultKind::kDeath ||
                                   f.kind == FaultKind::kTornWrite);
          });
      if (fired == 1 && death != result_.faults.end() &&
          absl::IsUnavailable(one.status) &&
          one.ended - death->when > kDeathIsKnown) {
        Fail(absl::StrCat("known after ",
                          absl::FormatDuration(one.ended - death->when), ": ",
                          where));
      }
    }
  }

  static std::string Statuses(const Outcome& outcome) {
    std::vector<std::string> lines;
    for (size_t rank = 0; rank < outcome.ranks.size(); ++rank) {
      lines.push_back(absl::StrCat(
          "\n    rank ", rank, ": ",
          outcome.ranks[rank].died ? "died"
                                   : outcome.ranks[rank].status.ToString()));
    }
    return absl::StrJoin(lines, "");
  }

  static absl::Status Wrong(absl::string_view what) {
    return absl::InternalError(absl::StrCat(kWrong, what));
  }

  // --- Calls of a communicator ---

  struct Step {
    enum Kind {
      kBarrier,
      kBroadcast,
      kAllGather,
      kBlobs,
      kReduce,
      kReduceScatter,
      kRing,
      kNumKinds
    };
    Kind kind;
    int64_t size;
    int root;
  };

  // What one rank does on purpose, instead of or beside its call.
  enum class Mischief { kNone, kAbort, kCancel, kOtherCall, kLeave };

  static std::string BytesFor(int step, int rank, int64_t size) {
    std::string bytes(size, '\0');
    uint64_t state = 1000003u * step + rank + 1;
    for (char& byte : bytes) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      byte = static_cast<char>(state >> 56);
    }
    return bytes;
  }

  static absl::Span<std::byte> BytesOf(std::string& text) {
    return absl::MakeSpan(reinterpret_cast<std::byte*>(text.data()),
                          text.size());
  }

  static absl::Status Take(Communicator& comm, int number, const Step& step,
                           const CallOptions& call) {
    const int ranks = comm.size();
    const int rank = comm.rank();
    const auto check = [&](bool right) {
      return right ? absl::OkStatus()
                   : Wrong(absl::StrCat("step ", number, " of kind ",
                                        static_cast<int>(step.kind), ", size ",
                                        step.size));
    };
    const auto size_of = [&](int r) { return step.size + 7 * r; };
    switch (step.kind) {
      case Step::kBarrier:
        return comm.Barrier(call);
      case Step::kBroadcast: {
        const std::string expected = BytesFor(number, step.root, step.size);
        std::string data =
            rank == step.root ? expected : std::string(step.size, 'x');
        DSD_RETURN_IF_ERROR(comm.Broadcast(BytesOf(data), step.root, call));
        return check(data == expected);
      }
      case Step::kAllGather: {
        std::vector<std::string> parts(ranks);
        std::vector<absl::Span<std::byte>> spans;
        for (int r = 0; r < ranks; ++r) {
          parts[r].resize(size_of(r));
          spans.push_back(BytesOf(parts[r]));
        }
        std::string mine = BytesFor(number, rank, size_of(rank));
        DSD_RETURN_IF_ERROR(comm.AllGather(BytesOf(mine), spans, call));
        bool right = true;
        for (int r = 0; r < ranks; ++r) {
          right &= parts[r] == BytesFor(number, r, size_of(r));
        }
        return check(right);
      }
      case Step::kBlobs: {
        DSD_ASSIGN_OR_RETURN(
            const std::vector<std::string> blobs,
            comm.AllGatherBlobs(BytesFor(number, rank, size_of(rank)),
                                step.size + 7 * ranks, call));
        bool right = true;
        for (int r = 0; r < ranks; ++r) {
          right &= blobs[r] == BytesFor(number, r, size_of(r));
        }
        return check(right);
      }
      case Step::kReduce:
      case Step::kReduceScatter: {
        // Sums of bytes, which wrap around.
        std::string expected(step.size, '\0');
        for (int r = 0; r < ranks; ++r) {
          const std::string part = BytesFor(number, r, step.size);
          for (int64_t i = 0; i < step.size; ++i) expected[i] += part[i];
        }
        std::string data = BytesFor(number, rank, step.size);
        if (step.kind == Step::kReduce) {
          DSD_RETURN_IF_ERROR(comm.AllReduce(BytesOf(data), DType::kUInt8,
                                             ReduceOp::kSum, call));
          return check(data == expected);
        }
        std::vector<int64_t> counts(ranks, step.size / ranks);
        counts[step.root] += step.size % ranks;
        int64_t begin = 0;
        for (int r = 0; r < rank; ++r) begin += counts[r];
        std::string out(counts[rank], 'x');
        DSD_RETURN_IF_ERROR(comm.ReduceScatter(BytesOf(data), counts,
                                               BytesOf(out), DType::kUInt8,
                                               ReduceOp::kSum, call));
        return check(out == expected.substr(begin, counts[rank]));
      }
      case Step::kRing: {
        const int next = (rank + 1) % ranks;
        const int previous = (rank + ranks - 1) % ranks;
        std::string out = BytesFor(number, rank, size_of(rank));
        std::string in(size_of(previous), 'x');
        DSD_RETURN_IF_ERROR(comm.Exchange(
            {{next, BytesOf(out)}}, {{previous, BytesOf(in)}}, "ring", call));
        return check(in == BytesFor(number, previous, size_of(previous)));
      }
      case Step::kNumKinds:
        break;
    }
    return absl::OkStatus();
  }

  std::vector<Step> RandomSteps(int ranks) {
    std::vector<Step> steps(Uniform(random_, 1, 6));
    for (Step& step : steps) {
      step.kind =
          static_cast<Step::Kind>(Uniform(random_, 0, Step::kNumKinds - 1));
      // Now and then beyond what rides in envelopes, and beyond trees.
      const int64_t most[] = {0, 100, 3000, 40000, 300000};
      step.size =
          Uniform(random_, 0, most[Uniform(random_, 0, ranks > 8 ? 2 : 4)]);
      step.root = static_cast<int>(Uniform(random_, 0, ranks - 1));
    }
    return steps;
  }

  // Some calls on the main lane; now and then others by a second thread on a
  // lane of its own.
  void RunCalls() {
    const int ranks = RandomRanks();
    const std::vector<Step> steps = RandomSteps(ranks);
    const std::vector<Step> others =
        Uniform(random_, 0, 2) == 0 ? RandomSteps(ranks) : std::vector<Step>();
    const int who = static_cast<int>(Uniform(random_, 0, ranks - 1));
    const size_t when =
        Uniform(random_, 0, static_cast<int64_t>(steps.size()) - 1);
    const Mischief mischief =
        Uniform(random_, 0, 3) == 0
            ? static_cast<Mischief>(Uniform(random_, 1, 4))
            : Mischief::kNone;
    result_.scenario = absl::StrCat(
        steps.size(), " + ", others.size(), " calls on ", ranks, " ranks",
        mischief == Mischief::kNone
            ? ""
            : absl::StrCat(", mischief ", static_cast<int>(mischief),
                           " of rank ", who, " at call ", when));
    bool with_mischief = false;
    const auto body = [&](Communicator& comm) -> absl::Status {
      std::unique_ptr<Communicator> lane;
      absl::Status of_others;
      std::unique_ptr<EnvThread> thread;
      if (!others.empty()) {
        DSD_ASSIGN_OR_RETURN(lane, comm.OpenLane("other", Call()));
        thread = comm.env()->StartThread("other", [&] {
          for (size_t i = 0; i < others.size() && of_others.ok(); ++i) {
            of_others =
                Take(*lane, 100 + static_cast<int>(i), others[i], Call());
          }
        });
      }
      std::atomic<bool> cancel{false};
      for (size_t i = 0; i < steps.size(); ++i) {
        CallOptions call = Call();
        if (with_mischief && comm.rank() == who && i == when) {
          switch (mischief) {
            case Mischief::kNone:
              break;
            case Mischief::kAbort:
              comm.Abort(absl::DataLossError("the model is gone"));
              break;
            case Mischief::kCancel:
              cancel = true;
              call.cancel = &cancel;
              break;
            case Mischief::kOtherCall: {
              Step other = steps[i];
              other.kind = other.kind == Step::kBarrier ? Step::kBroadcast
                                                        : Step::kBarrier;
              DSD_RETURN_IF_ERROR(Take(comm, 0, other, call));
              continue;
            }
            case Mischief::kLeave:
              return absl::OutOfRangeError("the job is over");
          }
        }
        DSD_RETURN_IF_ERROR(Take(comm, static_cast<int>(i), steps[i], call));
      }
      thread.reset();
      return of_others;
    };
    const RanksOptions with_bug = WithBug(bug_, ranks);
    if (!CheckAllOk(simulation_.Run(ranks, body, with_bug), "without faults")) {
      return;
    }
    AddFaults();
    with_mischief = true;
    const auto explains = [&](const absl::Status& status) {
      const absl::string_view text = status.message();
      switch (mischief) {
        case Mischief::kNone:
          return false;
        case Mischief::kAbort:
          return absl::IsAborted(status) &&
                 absl::StrContains(text, "the model is gone") &&
                 NamesRank(text, who);
        case Mischief::kCancel:
          return absl::IsCancelled(status) && NamesRank(text, who);
        case Mischief::kOtherCall:
          return absl::IsFailedPrecondition(status) ||
                 absl::IsDeadlineExceeded(status);
        case Mischief::kLeave:
          return absl::IsOutOfRange(status) ||
                 ((absl::IsUnavailable(status) ||
                   absl::IsDeadlineExceeded(status)) &&
                  NamesRank(text, who));
      }
      return false;
    };
    CheckVerdicts(simulation_.Run(ranks, body, with_bug),
                  mischief != Mischief::kNone, explains);
  }

  // --- Redistribution ---

  void RunRedistribute() {
    const int ranks = RandomRanks();
    result_.scenario = absl::StrCat("redistribute on ", ranks, " ranks");
    const std::vector<test::TensorCase> tensors =
        test::RandomTensors(random_, ranks);
    TransferOptions options;
    const int64_t chunks[] = {16, 100, 1000, int64_t{4} << 20};
    // Each waits for a round trip, and so do many ranks in turn.
    options.chunk_bytes = chunks[Uniform(random_, ranks > 8 ? 2 : 0, 3)];
    options.call = Call();
    const auto body = [&](Communicator& comm) -> absl::Status {
      test::Side source;
      test::Side target;
      DSD_RETURN_IF_ERROR(test::FillSide(tensors, comm.rank(), true, source));
      DSD_RETURN_IF_ERROR(test::FillSide(tensors, comm.rank(), false, target));
      DSD_RETURN_IF_ERROR(
          Redistribute(source.endpoint, target.endpoint, &comm, options)
              .status());
      const absl::Status right = test::CheckSide(tensors, comm.rank(), target);
      return right.ok() ? right : Wrong(right.message());
    };
    const RanksOptions with_bug = WithBug(bug_, ranks);
    if (!CheckAllOk(simulation_.Run(ranks, body, with_bug), "without faults")) {
      return;
    }
    AddFaults();
    CheckVerdicts(simulation_.Run(ranks, body, with_bug));
  }

  // --- Checkpoints ---

  struct Tensors {
    std::vector<std::pair<std::vector<int64_t>, DType>> kinds;
  };

  Tensors RandomKinds() {
    const DType types[] = {DType::kUInt8, DType::kBFloat16, DType::kFloat32,
                           DType::kInt64};
    Tensors tensors;
    for (int64_t left = Uniform(random_, 1, 3); left > 0; --left) {
      tensors.kinds.emplace_back(test::RandomShape(random_, 200),
                                 types[Uniform(random_, 0, 3)]);
    }
    return tensors;
  }

  // The same tensors on some ranks, laid out at random.
  std::vector<TestTensor> LayOut(const Tensors& tensors, int ranks) {
    test::RandomLayoutOptions options;
    for (int rank = 0; rank < ranks; ++rank) options.holders.push_back(rank);
    std::vector<TestTensor> out;
    for (const auto& [shape, dtype] : tensors.kinds) {
      const absl::StatusOr<Layout> layout =
          test::BuildLayout(test::RandomLayoutSpec(random_, shape, options));
      if (!layout.ok()) {
        Fail(layout.status().ToString());
        continue;
      }
      out.push_back({{absl::StrCat("tensor", out.size())}, dtype, *layout});
    }
    return out;
  }

  static std::vector<ObjectEntry> Objects(uint64_t content) {
    return {{{std::string("step")}, Object(static_cast<int64_t>(content))}};
  }

  // Saves; `saved` counts the ranks on which Save returned OK.
  Outcome Save(const std::vector<TestTensor>& tensors, int ranks,
               uint64_t content, int* saved = nullptr) {
    return simulation_.Run(
        ranks,
        [&](Communicator& comm) -> absl::Status {
          TestState state = TestState::Filled(tensors, comm.rank(), content,
                                              Objects(content));
          checkpoint::SaveOptions options;
          options.call = Call();
          DSD_RETURN_IF_ERROR(
              checkpoint::Save(kDir, state.state(), &comm, options).status());
          // The dead are past counting.
          if (saved != nullptr && !simulation_.scheduler().IsRunningOut()) {
            ++*saved;
          }
          return absl::OkStatus();
        },
        WithBug(bug_, ranks));
  }

  // Loads; each rank returns OK if it has the content of one of `contents`, and
  // sets `found`.
  Outcome Load(const std::vector<TestTensor>& tensors, int ranks,
               const std::vector<uint64_t>& contents, uint64_t* found) {
    return simulation_.Run(
        ranks,
        [&, found](Communicator& comm) -> absl::Status {
          TestState state = TestState::Blank(tensors, comm.rank(), Objects(0));
          checkpoint::LoadOptions options;
          options.call = Call();
          DSD_ASSIGN_OR_RETURN(
              const checkpoint::LoadReport report,
              checkpoint::Load(kDir, state.state(), &comm, options));
          if (simulation_.scheduler().IsRunningOut()) return absl::OkStatus();
          if (!report.verified) return Wrong("not verified");
          // The object tells which save it is; small tensors may not.
          const auto content =
              std::find_if(contents.begin(), contents.end(), [&](uint64_t c) {
                return state.state().objects[0].value ==
                       Object(static_cast<int64_t>(c));
              });
          if (content == contents.end()) return Wrong("an object of no save");
          const std::string difference = state.Difference(*content);
          if (!difference.empty()) return Wrong(difference);
          if (*found != 0 && *found != *content) {
            return Wrong("ranks loaded different saves");
          }
          *found = *content;
          return absl::OkStatus();
        },
        WithBug(bug_, ranks));
  }

  // What a fresh job finds in the directory: a save of `contents`, 0 if there
  // is none, or nullopt with a failure.
  std::optional<uint64_t> Holds(const Tensors& kinds,
                                const std::vector<uint64_t>& contents) {
    const int ranks = static_cast<int>(Uniform(random_, 1, 3));
    uint64_t found = 0;
    const Outcome outcome = Load(LayOut(kinds, ranks), ranks, contents, &found);
    bool none = true;
    for (const absl::Status& status : outcome.Survivors()) {
      none &= absl::IsNotFound(status);
    }
    if (none) return 0;
    // A link that changed what ranks told each other in a save is found here.
    for (const absl::Status& status : outcome.Survivors()) {
      if (!status.ok() && Fired(FaultKind::kCorruptByte) &&
          !absl::StartsWith(status.message(), kWrong)) {
        return std::nullopt;
      }
    }
    if (!CheckAllOk(outcome, "load after the faults")) return std::nullopt;
    return found;
  }

  void RunSave() {
    constexpr uint64_t kOld = 1;
    constexpr uint64_t kNew = 2;
    constexpr uint64_t kLast = 3;
    const bool over = Uniform(random_, 0, 2) > 0;
    const int ranks = RandomRanks();
    result_.scenario =
        absl::StrCat(over ? "save over" : "save", " on ", ranks, " ranks");
    const Tensors kinds = RandomKinds();
    // Once without faults; for a fresh save it is cleared away again.
    if (!CheckAllOk(Save(LayOut(kinds, ranks), ranks, kOld), "save")) return;
    if (!over) {
      const auto names = simulation_.disk().List(kDir);
      for (const std::string& name : *names) {
        simulation_.disk().Remove(absl::StrCat(kDir, "/", name)).IgnoreError();
      }
      simulation_.disk().SyncDir(kDir).IgnoreError();
    }
    AddFaults();
    int saved = 0;
    CheckVerdicts(Save(LayOut(kinds, ranks), ranks, kNew, &saved));
    if (simulation_.lost_power()) simulation_.Recover();
    const std::optional<uint64_t> holds = Holds(kinds, {kOld, kNew});
    // The verdict itself may be what a link has changed.
    if (holds.has_value() && !Fired(FaultKind::kCorruptByte)) {
      if (saved > 0 && *holds != kNew) {
        Fail(absl::StrCat(saved,
                          " ranks were told that the save succeeded, but "
                          "the directory holds ",
                          *holds));
      }
      if (over && *holds == 0) Fail("the old checkpoint is gone");
      if (!over && *holds == kOld) Fail("a checkpoint has come back");
    }
    // Nothing of it is in the way of the next.
    const int next = static_cast<int>(Uniform(random_, 1, 3));
    if (!CheckAllOk(Save(LayOut(kinds, next), next, kLast), "the next save")) {
      return;
    }
    if (Holds(kinds, {kLast}) != kLast) Fail("the next save is not there");
  }

  void RunLoad() {
    constexpr uint64_t kContent = 7;
    const int ranks = RandomRanks();
    result_.scenario = absl::StrCat("load on ", ranks, " ranks");
    const Tensors kinds = RandomKinds();
    const int writers = static_cast<int>(Uniform(random_, 1, 4));
    if (!CheckAllOk(Save(LayOut(kinds, writers), writers, kContent), "save")) {
      return;
    }
    const std::vector<TestTensor> tensors = LayOut(kinds, ranks);
    uint64_t found = 0;
    if (!CheckAllOk(Load(tensors, ranks, {kContent}, &found), "load")) return;
    AddFaults();
    CheckVerdicts(Load(tensors, ranks, {kContent}, &found));
    if (simulation_.lost_power()) simulation_.Recover();
    if (Holds(kinds, {kContent}) != kContent) {
      Fail("the checkpoint is not there any more");
    }
  }

  const PlantedBug bug_;
  Random random_;
  Simulation simulation_;
  SeedResult result_;
};

}  // namespace

SeedResult RunSeed(uint64_t seed, PlantedBug bug) {
  return Job(seed, bug).Run();
}

}  // namespace dsd
