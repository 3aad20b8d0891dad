// SPDX-License-Identifier: Apache-2.0

#include "dsd/examples/train_digits.h"

int main(int argc, char** argv) {
  return dsd_examples::TrainDigitsMain(argc, argv);
}
