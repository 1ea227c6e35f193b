"""Chips: what groups of them can send, and that each is described whole."""

import pytest

from weft.planner.chips import CHIPS, chip_named, chip_of_device, group_rate, torus_shape
from weft.runtime.errors import UserError

WANTED = ('h100', 'h200', 'b200', 'gb200', 'a100', 'mi300x', 'v4', 'v5e', 'v5p', 'v6e', 'v7x')


@pytest.mark.parametrize('name', WANTED)
def test_each_chip_is_described_whole(name):
    chip = chip_named(name.upper())
    assert chip_of_device(chip.kinds[-1]) is chip
    assert chip.float32_flops <= chip.bfloat16_flops <= chip.float8_flops
    assert chip.network < chip.links < chip.bandwidth < chip.bfloat16_flops
    assert 0 < chip.efficiency < 1
    assert chip.source


def test_an_unknown_chip_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"--chip 'h10': no such chip; did you mean 'h100'"):
        chip_named('h10')


def test_tori_are_as_even_as_can_be():
    assert torus_shape(CHIPS['v5p'], 1024) == (8, 8, 16)
    assert torus_shape(CHIPS['v5p'], 64) == (4, 4, 4)
    assert torus_shape(CHIPS['v6e'], 256) == (16, 16)
    assert torus_shape(CHIPS['v6e'], 512) == (16, 16)  # two slices
    assert torus_shape(CHIPS['h100'], 64) == ()


def test_a_host_of_gpus_is_one_switch_and_beyond_it_each_has_its_port():
    rate = lambda *a: group_rate(CHIPS['h100'], 64, *a)
    assert rate(1, 1, 'all_gather') == float('inf')
    assert rate(8, 1, 'all_gather') == rate(8, 1, 'ppermute') == 450e9
    assert rate(8, 8, 'all_gather') == rate(8, 8, 'all_to_all') == 50e9
    # All 64: each host's eight ports bring in 56 of 64 parts, once for all eight, of the 63 that each device counts.
    assert rate(64, 1, 'all_gather') == pytest.approx(8 * 50e9 * 63 / 56)
    assert rate(64, 1, 'all_to_all') == pytest.approx(50e9 * 63 / 56)
    assert rate(64, 1, 'ppermute') == 50e9


def test_a_torus_sends_along_the_dims_that_a_group_lies_along():
    rate = lambda *a: group_rate(CHIPS['v5p'], 1024, *a)
    assert rate(8, 1, 'all_gather') == 2 * 100e9  # a ring of 8, both ways round
    assert rate(128, 8, 'all_gather') == 4 * 100e9  # the other two dims
    assert rate(1024, 1, 'all_gather') == 6 * 100e9
    assert rate(4, 1, 'all_gather') == 100e9  # half of a ring is a line
    assert rate(8, 1, 'ppermute') == 100e9
    assert rate(8, 1, 'all_to_all') == pytest.approx(100e9 * 7 / 8)
    assert group_rate(CHIPS['v5e'], 64, 8, 1, 'all_gather') == 50e9  # only a whole pod's 16 close to rings
    assert group_rate(CHIPS['v6e'], 512, 2, 256, 'all_reduce') == 12.5e9  # two slices


@pytest.mark.parametrize('name', WANTED)
def test_no_group_sends_more_than_its_links(name):
    chip = CHIPS[name]
    for chips in (2, 8, 64, 256, 1024):
        for group in (2, 4, 8, 64, 256):
            for stride in (1, 2, 8):
                if group * stride <= chips:
                    for kind in ('all_gather', 'all_to_all', 'ppermute', 'psum'):
                        assert 0 < group_rate(chip, chips, group, stride, kind) <= chip.links
