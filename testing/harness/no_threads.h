// SPDX-License-Identifier: Apache-2.0
//
// For tests: a process that cannot start threads.

#ifndef DSD_TESTING_HARNESS_NO_THREADS_H_
#define DSD_TESTING_HARNESS_NO_THREADS_H_

#include <pthread.h>

#include <cstddef>

#include "gtest/gtest.h"

namespace dsd {

// While it lives new threads want stacks larger than all memory, so that the
// system refuses them as it does where threads have run out.
class NoThreads {
 public:
  NoThreads() {
    EXPECT_EQ(pthread_getattr_default_np(&before_), 0);
    pthread_attr_t huge;
    EXPECT_EQ(pthread_attr_init(&huge), 0);
    EXPECT_EQ(pthread_attr_setstacksize(&huge, size_t{1} << 48), 0);
    EXPECT_EQ(pthread_setattr_default_np(&huge), 0);
    pthread_attr_destroy(&huge);
  }
  NoThreads(const NoThreads&) = delete;
  ~NoThreads() {
    EXPECT_EQ(pthread_setattr_default_np(&before_), 0);
    pthread_attr_destroy(&before_);
  }

 private:
  pthread_attr_t before_;
};

}  // namespace dsd

#endif  // DSD_TESTING_HARNESS_NO_THREADS_H_
