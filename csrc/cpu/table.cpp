// The entry points of one instruction set.
#include "rows.h"

#define BMTARD_NAME_OF(target) #target
#define BMTARD_NAME(target) BMTARD_NAME_OF(target)

BMTARD_NAMESPACE_BEGIN

extern const cpu::Kernels table;
const cpu::Kernels table = {
    BMTARD_NAME(BMTARD_TARGET),
    softmax_entropy,
    softmax_entropy_backward,
    bisect_temperature,
    multi_teacher_kl,
    multi_teacher_kl_backward,
    bmtard_loss,
    pgd_step,
    scale,
};

BMTARD_NAMESPACE_END
