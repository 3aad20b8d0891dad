#!/bin/sh
# Runs a test with the pinned PyTorch. Arguments: the interpreter, the test, its arguments.
exec "$@"
