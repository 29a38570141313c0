// The torch this binary was compiled for, as text in its file: `kbfgs_ext/environment.py` reads it
// there before it loads anything. A binary for another torch may load all the same, misread dtypes
// and fail in its first call.
#include <torch/version.h>

#if defined(__GNUC__)
#define KBFGS_KEPT __attribute__((visibility("default"), used))
#else
#define KBFGS_KEPT
#endif

extern "C" {
extern const char kbfgs_ext_built_for[];
KBFGS_KEPT const char kbfgs_ext_built_for[] = "kbfgs_ext built for torch " TORCH_VERSION;
}
