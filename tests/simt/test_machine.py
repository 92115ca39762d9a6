"""The machine itself: what its conversions give, and that it sees what it should see."""

from __future__ import annotations

import numpy as np
import pytest

from . import harness as h


def test_half_types_convert_as_numpy_does():
    simt = h.simt()
    every = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    for bits in every.tolist():
        want16 = float(np.uint16(bits).view(np.float16))
        wide16 = simt.widen_float16(bits)
        wide_b = simt.widen_bfloat16(bits)
        assert wide16 == want16 or np.isnan([wide16, want16]).all()
        assert np.isnan(wide_b) or wide_b == h.decode(np.uint16([bits]))[0]
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.standard_normal(500) * 10.0 ** rng.integers(-9, 6, 500),
            [0.0, -0.0, 65519.0, 65520.0, -1e9, np.inf, -np.inf, 6e-8, 2.9e-8, 3e-8, 1 + 2**-11],
            [1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8],  # ties
        ]
    )
    for value in values.astype(np.float32).tolist():
        assert simt.narrow_float16(value) == h.encode(np.array([value]), "float16").view(np.uint16)
        assert simt.narrow_bfloat16(value) == h.encode(np.array([value]), "bfloat16")


@pytest.mark.parametrize("seed", range(4))
def test_correct_kernels_run(seed):
    h.simt().configure(seed=seed)
    assert h.simt().run_probe("with_barrier") == [(i + 1) % 64 for i in range(64)]
    # Three doublings a round; the groups of a pair 16 lanes apart differ by two rounds.
    rounds = [8 ** (1 + i % 32 // 8) for i in range(64)]
    want = [rounds[i] + rounds[i ^ 16] for i in range(64)]
    assert h.simt().run_probe("uneven_groups") == want
    h.simt().configure(seed=seed, max_cluster=4)
    want = [rank for rank in (1, 2, 3, 0) for _ in range(16)]
    assert h.simt().run_probe("pass_on_in_cluster") == want
    assert h.simt().run_probe("grid_barrier") == [7] * 64
    assert h.simt().run_probe("global_in_cluster") == want
    assert h.simt().run_probe("global_in_grid") == want
    assert h.simt().run_probe("global_with_barriers") == [(i + 1) % 64 for i in range(64)]


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("without_barrier", "without a barrier between|before it is written"),
        ("never_written", "before it is written"),
        ("past_the_end", "of a shared array of 64"),
        ("leave_before_the_barrier", "leaves while others wait|other threads have left"),
        ("two_barriers", "another thread waits at the barrier"),
        ("barrier_and_shuffle", "deadlock"),
        ("not_in_the_mask", "leaves it out"),
        ("source_not_in_the_mask", "which the mask leaves out"),
        ("lane_has_left", "waits for it|a lane that has left"),
        ("misaligned", "misaligned access of 8 bytes"),
        ("no_cluster_barrier", "another block without a barrier|written|not touched"),
        ("leave_while_others_read", "a block that threads have left|leaves while others wait"),
        ("overwrite_what_others_read", "(writes what was read,|reads) .* another block"),
        ("outside_the_cluster", "reads from block 4 of a cluster of 4|writes"),
        ("some_blocks_wait", "other threads have left|leaves while others wait"),
        ("different_cluster_barriers", "another thread waits at the barrier"),
        ("grid_barrier_in_a_cluster", "a grid that is not cooperative"),
        ("global_read_too_early", "(reads|writes) what was (written|read) by block 0 thread"),
        ("global_write_too_early", "(reads|writes) what was (written|read) by block 0 thread"),
        ("global_block_barrier", "(reads|writes) what was (written|read) by block"),
        ("global_block_barrier_in_cluster", "(reads|writes) what was (written|read) by"),
        ("global_block_barrier_in_grid", "(reads|writes) what was (written|read) by"),
        ("global_across_clusters", "(reads|writes) what was (written|read) by block"),
        ("every_thread_writes", "global memory: .* writes what was written by block 0 thread"),
        ("every_block_writes", "global memory: .* writes what was written by block . thread 0"),
        ("every_block_of_a_cluster_writes", "writes what was written by block . thread 0"),
        ("halves_of_a_pack", "writes what was written by block 0 thread [01]"),
        ("write_what_all_read", "what was (read by (block|several)|written by block 2 thread 7)"),
        ("write_what_a_cluster_reads", "what was (read by (block|several)|written by block 2)"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_faults_are_seen(probe, message, seed):
    """Whatever the order of the threads; and the machine works on afterwards."""
    h.simt().configure(seed=seed, max_cluster=4)
    with pytest.raises(h.simt().Fault, match=message):
        h.simt().run_probe(probe)
    assert h.simt().run_probe("with_barrier")[0] == 1


def test_seeds_change_the_order():
    """Without a barrier it depends on the order which of two faults comes first."""
    messages = set()
    for seed in range(8):
        h.simt().configure(seed=seed)
        with pytest.raises(h.simt().Fault) as caught:
            h.simt().run_probe("without_barrier")
        messages.add(str(caught.value))
    assert len(messages) > 4
