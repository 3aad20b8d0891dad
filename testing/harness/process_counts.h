// SPDX-License-Identifier: Apache-2.0
//
// What this process has of the system, for tests that nothing is left behind.

#ifndef DSD_TESTING_HARNESS_PROCESS_COUNTS_H_
#define DSD_TESTING_HARNESS_PROCESS_COUNTS_H_

namespace dsd::test {

// Open file descriptors.
int OpenDescriptors();

// Running threads, or no more than `expected` as soon as that is so: one that
// has been joined is listed for a moment longer.
int RunningThreads(int expected = 0);

// Resident memory at its largest, since the last reset if there was one.
double PeakMiB();
double ResetPeakMiB();  // returns MemoryMiB()
// Resident memory now.
double MemoryMiB();

}  // namespace dsd::test

#endif  // DSD_TESTING_HARNESS_PROCESS_COUNTS_H_
