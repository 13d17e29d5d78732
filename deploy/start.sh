#!/bin/sh
# The server on the model of FASTRERANK_MODEL: a mounted folder, or a hub id; further arguments are options of
# `fastrerank serve`. `exec`: the server gets SIGTERM itself and finishes what it has accepted.
set -eu
exec fastrerank serve --host 0.0.0.0 --port "${PORT:-8080}" --model "${FASTRERANK_MODEL:-/model}" "$@"
