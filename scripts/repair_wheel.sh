#!/bin/sh
# repair_wheel.sh WHEEL FOLDER: the wheel for every Linux of at least this glibc, into the folder.
# torch brings these libraries; a second copy in the wheel would be a second torch.
exec auditwheel repair --wheel-dir "$2" "$1" \
    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcud*'
