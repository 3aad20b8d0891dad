#!/bin/sh
# Runs source_rules.py on the repository that this test was built from, which it finds through a link to one of its
# files. Arguments: source_rules.py, WORKSPACE.
exec python3 -B "$1" "$(dirname "$(readlink -f "$2")")"
