"""Faults of the kernels, one file for each kernel or shared header; test_mutants.py runs them."""

from __future__ import annotations

from ..mutation import Mutant
from . import (
    ahead,
    batch,
    bisect_temperature,
    bmtard_loss,
    clusters,
    launches,
    multi_teacher_kl,
    pgd_step,
    rows,
    scale,
    softmax_entropy,
)

MUTANTS: list[Mutant] = [
    *rows.MUTANTS,
    *ahead.MUTANTS,
    *clusters.MUTANTS,
    *batch.MUTANTS,
    *launches.MUTANTS,
    *softmax_entropy.MUTANTS,
    *bisect_temperature.MUTANTS,
    *multi_teacher_kl.MUTANTS,
    *bmtard_loss.MUTANTS,
    *pgd_step.MUTANTS,
    *scale.MUTANTS,
]
