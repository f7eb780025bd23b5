// The loops for CPUs with AVX2 and FMA (CMakeLists.txt has the flags).
// Nothing else may be included: an inline function from a header would be compiled for the wrong CPU and might be the
// copy that the linker keeps.
#define FR_ISA avx2
#include "chunk_loops.h"
#include "loops/fma.h"

// loops that use it
#include "loops/adam.h"
#include "loops/ema.h"
#include "loops/half.h"
#include "loops/norm.h"
#include "loops/resize.h"
#include "loops/sgd.h"
