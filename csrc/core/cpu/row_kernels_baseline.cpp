// Row kernels for any processor of the architecture.
#define ANISO_ISA baseline
#include "row_kernels_body.h"
