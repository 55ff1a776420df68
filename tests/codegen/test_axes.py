from codegen import axes


def test_every_arch_names_a_family():
    assert {arch.family for arch in axes.ARCHS.values()} <= set(axes.FAMILIES)


def test_families_agree_with_their_gpus():
    for family in axes.FAMILIES.values():
        assert (
            family.smem_per_block + family.smem_reserved_per_block == family.smem_per_sm
            or family.name == "sm75"
        )
        assert set(family.dtypes) <= set(axes.DTYPES)


def test_turing_is_known_and_not_built():
    assert axes.ARCHS[75].family == "sm75"
    assert "sm75" not in [family.name for family in axes.built_families()]
    assert not axes.is_legal("sm75", "forward", "fp16", "full")


def test_every_built_family_has_every_direction():
    assert all(set(family.directions) == set(axes.DIRECTIONS) for family in axes.built_families())


def test_legal_is_direction_dtype_and_mask():
    assert axes.is_legal("sm80", "forward", "bf16", "full")
    assert axes.is_legal("sm90", "backward", "bf16", "causal")
    assert not axes.is_legal("sm80", "forward", "fp8", "full")
    assert axes.is_legal("sm90", "split", "bf16", "windowed")
    assert not axes.is_legal("sm90", "split", "bf16", "causal")
