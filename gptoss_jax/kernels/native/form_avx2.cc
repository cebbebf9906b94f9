// The form for AVX2 (x86 since 2013): everything in float32. Knows which way serves which types.
#include <cstdint>
#include <cstring>

#include "form.h"
#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

GPTOSS_TARGET_BEGIN("avx2,fma")
#include "avx2.h"
#include "float32_form.h"

namespace gptoss {
namespace {
constexpr Form kForm = {"avx2", few_in_float32<Dot>, many_in_float32<Core>, many_from_rows<17>};
}
const Form* const kAvx2Form = &kForm;
}  // namespace gptoss
GPTOSS_TARGET_END
#else
namespace gptoss {
const Form* const kAvx2Form = nullptr;
}
#endif
