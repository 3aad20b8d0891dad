// SPDX-License-Identifier: Apache-2.0
//
// A program without a line of dsd in it loads a library with all backends:
// they are registered there, and work.

#include <dlfcn.h>

#include <cstddef>

#include "gtest/gtest.h"

namespace {

constexpr size_t kTextBytes = 4096;

TEST(DynamicLinkTest, ASharedLibraryBringsItsBackends) {
  void* const library = dlopen(DSD_COMPOSED_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(library, nullptr) << dlerror();
  const auto backends = reinterpret_cast<void (*)(char*, size_t)>(
      dlsym(library, "ComposedBackends"));
  const auto sum = reinterpret_cast<void (*)(const char*, char*, size_t)>(
      dlsym(library, "ComposedSum"));
  ASSERT_NE(backends, nullptr);
  ASSERT_NE(sum, nullptr);
  char text[kTextBytes];
  backends(text, sizeof(text));
  EXPECT_STREQ(text, "gloo,local,nccl,ucx");
  for (const char* backend : {"gloo", "local", "ucx"}) {
    sum(backend, text, sizeof(text));
    EXPECT_STREQ(text, "OK") << backend;
  }
}

}  // namespace
