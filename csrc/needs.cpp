// The oldest torch that this binary works with, as text in its file: `kbfgs_ext/environment.py` reads
// it there before it loads anything.
#include "common/stable.h"

#if defined(__GNUC__)
#define KBFGS_KEPT __attribute__((used))
#else
#define KBFGS_KEPT
#endif

#define KBFGS_TEXT_OF(major, minor) #major "." #minor
#define KBFGS_TEXT(major, minor) KBFGS_TEXT_OF(major, minor)

KBFGS_KEPT extern const char kbfgs_ext_needs[] =
    "kbfgs_ext needs torch " KBFGS_TEXT(KBFGS_TORCH_MAJOR, KBFGS_TORCH_MINOR);
