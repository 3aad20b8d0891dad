// SPDX-License-Identifier: Apache-2.0
//
// The connections of who serves the store, rank 0 or a relay: how they begin,
// who may come in, what strangers may cost, who gives no sign of life. What is
// said on them is the host's business. Private to this package.

#ifndef DSD_CORE_COMM_RECEPTION_H_
#define DSD_CORE_COMM_RECEPTION_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store_protocol.h"

namespace dsd {

struct ReceptionOptions {
  int rank = 0;  // who serves, for error texts
  // See TcpStoreServerOptions.
  std::string job_id;
  uint64_t generation = 0;
  std::string token;
  absl::Duration greeting_patience = absl::Seconds(20);
  absl::Duration heartbeat_bound = absl::ZeroDuration();
};

// All but Stop is for the thread that runs it, before Run or from its host.
class Reception {
 public:
  using Id = uint64_t;  // of a connection; never 0

  // What one that has greeted is told.
  struct Place {
    StoreRole role = StoreRole::kClient;
    int relay_rank = 0;  // of kElsewhere
    std::string address;
  };

  // Called from Run.
  class Host {
   public:
    virtual ~Host() = default;
    // Not called again about one that is sent elsewhere.
    virtual Place Welcome(Id id, int rank) = 0;
    // Returns false for a frame that is not understood: the end of it.
    virtual bool Handle(Id id, absl::string_view body) = 0;
    // It gives no sign of life, and stays connected, so that it hears of this
    // should it go on. `how`: BeatWatch::HowLong.
    virtual void Silent(Id id, absl::string_view how) = 0;
    // The connection has ended.
    virtual void Gone(Id id) = 0;
    // Once a round, after what has arrived was handled; at NextWork, too.
    virtual void Work(absl::Time now) = 0;
    virtual absl::Time NextWork() = 0;
    // After Stop: whether only what is to be sent is left to do.
    virtual bool MayEnd() { return true; }
  };

  Reception(Env* env, const ReceptionOptions& options, Socket listener,
            Waker waker);

  const BeatWatch& beats() const { return beats_; }
  // That no connection has.
  Id NewId() { return next_id_++; }
  // One that was made elsewhere, to one that relays or to whom it is relayed.
  Id Adopt(Socket socket);
  // Nothing happens for those that are not there any more.
  void Send(Id id, absl::string_view frame);
  // Why no rank can be let in now; empty if nothing is in the way.
  std::string Hindrance(absl::Time now) const;
  // When what was sent is on its way.
  void Close(Id id);
  // In each round after the others: its process may end when it has heard what
  // they are to hear, and this one with it.
  void WriteLast(Id id);
  void StopAccepting() { listener_.Close(); }

  // Until Stop. What is under way then is delivered (within a second).
  void Run(Host& host);
  void Stop();

 private:
  enum class Stage { kHello, kProof, kWelcome };
  struct Connection {
    Socket socket;
    std::string in;
    std::string out;
    Stage stage = Stage::kHello;
    std::string job;  // that it says it belongs to
    uint64_t generation = 0;
    int rank = 0;
    std::string client_nonce;
    std::string server_nonce;
    size_t max_frame_bytes = kMaxHelloBytes;
    absl::Status refusal;  // whatever it says
    bool closing = false;  // after what is in `out`
    bool last = false;
    bool silent = false;  // was given up
    absl::Time deadline;  // until welcome, or to be closed
    absl::Time heard;     // a sign of life
  };

  bool Stopping() {
    absl::MutexLock lock(&mu_);
    return stopping_;
  }
  absl::Time NextEvent(Host& host) const;
  void Accept();
  void DropStrangers();
  void Read(Host& host, Id id, Connection& connection);
  void Write(Id id, Connection& connection);
  // These return false for a frame that is not understood.
  bool Handle(Host& host, Id id, Connection& connection,
              absl::string_view body);
  bool Greet(Host& host, Id id, Connection& connection, FrameReader& reader);
  bool CheckProof(Host& host, Id id, Connection& connection,
                  FrameReader& reader);
  void Welcome(Host& host, Id id, Connection& connection);
  void Refuse(Connection& connection, const absl::Status& verdict);
  void GiveUpSilent(Host& host, absl::Time now);
  void Reap(Host& host);

  Env* const env_;
  const ReceptionOptions options_;
  Socket listener_;
  Waker waker_;
  BeatWatch beats_;
  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  Id next_id_ = 1;
  absl::btree_map<Id, Connection> connections_;
  std::vector<Id> broken_;
  absl::Time accept_after_ = absl::InfinitePast();
  // Its room is for one who is told that there is none.
  Socket spare_;
  std::string hindrance_;
  absl::Time hindered_at_ = absl::InfinitePast();
};

}  // namespace dsd

#endif  // DSD_CORE_COMM_RECEPTION_H_
