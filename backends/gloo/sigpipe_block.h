// SPDX-License-Identifier: Apache-2.0
//
// Keeps a write to a broken connection from ending the process. Gloo writes
// without MSG_NOSIGNAL (when a message is posted, and in its own thread), and a
// library must not change what the program does with signals.

#ifndef DSD_BACKENDS_GLOO_SIGPIPE_BLOCK_H_
#define DSD_BACKENDS_GLOO_SIGPIPE_BLOCK_H_

#include <signal.h>
#include <time.h>

namespace dsd {

// Blocks SIGPIPE in this thread, and in threads that it starts meanwhile for
// all their life; takes back what arrived in between.
class SigpipeBlock {
 public:
  SigpipeBlock() {
    sigemptyset(&sigpipe_);
    sigaddset(&sigpipe_, SIGPIPE);
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &sigpipe_, &before_);
  }
  SigpipeBlock(const SigpipeBlock&) = delete;
  ~SigpipeBlock() {
    if (!was_pending_) {
      const timespec now = {};
      sigtimedwait(&sigpipe_, nullptr, &now);
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  sigset_t sigpipe_;
  sigset_t before_;
  bool was_pending_;
};

}  // namespace dsd

#endif  // DSD_BACKENDS_GLOO_SIGPIPE_BLOCK_H_
