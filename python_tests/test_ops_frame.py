"""The frame: what it refuses and how it says so, identity by content, immutability, and conversions."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from cases import BRANCHES, Case, arrays_of, frame_of, rows_of

import aniso_ext
from aniso_ext import ops
from aniso_ext.errors import AnisoError, InputError
from aniso_ext.ops import Frame

CASE = Case(8, 4, knots=5, complement="diagonal", calibrated=True)
D, R, M, K = 8, 4, 2, 5
FIELDS = (
    "source_mean",
    "target_mean",
    "basis",
    "radius_source_knots",
    "radius_target_knots",
    "complement_scale",
    "output_mean",
)


def tensors(case: Case = CASE) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in arrays_of(case).items()}


def build(complement: str = "diagonal", **changes: object) -> Frame:
    return Frame(**{**tensors(), **changes}, complement=complement)


zeros = torch.zeros
WRONG = {
    "basis of one dimension": ({"basis": zeros(D)}, r"Frame\.basis must be \[D, R\], got shape \[8\]"),
    "knots of one dimension": (
        {"radius_source_knots": zeros(K)},
        r"Frame\.radius_source_knots must be \[M, K\], got \[5\]",
    ),
    "odd rank": ({"basis": zeros(D, 3)}, "rank must be even, at least 2 and at most the width 8, got 3"),
    "no rank": ({"basis": zeros(D, 0)}, "got 0"),
    "rank above width": ({"basis": zeros(4, 6)}, "at most the width 4, got 6"),
    "one knot": ({"radius_source_knots": zeros(M, 1)}, "needs 2 to 32767 knots, got 1"),
    "too many knots": ({"radius_source_knots": zeros(M, 32768)}, "needs 2 to 32767 knots, got 32768"),
    "source mean": ({"source_mean": zeros(7)}, r"Frame\.source_mean must have shape \[8\], got \[7\]"),
    "target mean": ({"target_mean": zeros(8, 1)}, r"Frame\.target_mean must have shape \[8\], got \[8, 1\]"),
    "output mean": ({"output_mean": zeros(9)}, r"Frame\.output_mean must have shape \[8\], got \[9\]"),
    "blocks": (
        {"radius_source_knots": zeros(3, K)},
        r"Frame\.radius_source_knots must have shape \[2, 5\], got \[3, 5\]",
    ),
    "target knots": (
        {"radius_target_knots": zeros(M, 6)},
        r"Frame\.radius_target_knots must have shape \[2, 5\], got \[2, 6\]",
    ),
    "diagonal scale": ({"complement_scale": zeros(1)}, r"Frame\.complement_scale must have shape \[8\], got \[1\]"),
    "integers": (
        {"source_mean": zeros(D, dtype=torch.int64)},
        r"Frame\.source_mean is torch\.int64, but the basis is torch\.float64",
    ),
    "two dtypes": ({"target_mean": zeros(D)}, r"Frame\.target_mean is torch\.float32, but the basis is torch\.float64"),
    "two devices": (
        {"output_mean": zeros(D, dtype=torch.float64, device="meta")},
        r"Frame\.output_mean is on meta, but the basis is on cpu",
    ),
    "an array": ({"basis": arrays_of(CASE)["basis"]}, r"Frame\.basis must be a torch\.Tensor, got ndarray"),
    "none": ({"source_mean": None}, r"Frame\.source_mean must be a torch\.Tensor, got NoneType"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_name(name):
    changes, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        build(**changes)
    assert issubclass(InputError, AnisoError) and issubclass(InputError, ValueError)


def test_integer_frames_are_refused():
    whole = {name: value.long() for name, value in tensors().items()}
    with pytest.raises(InputError, match="floating"):
        Frame(**whole, complement="diagonal")


def test_unknown_complements_are_refused():
    with pytest.raises(InputError, match="scalar, diagonal, diagonal_projected, got 'full'"):
        build(complement="full")


def test_a_scalar_complement_has_one_value():
    with pytest.raises(InputError, match=r"complement_scale must have shape \[1\], got \[8\]"):
        build(complement="scalar")


def test_letters_and_names():
    frame = build()
    assert (frame.width, frame.rank, frame.blocks, frame.knots) == (D, R, M, K)
    assert (frame.dtype, frame.device) == (torch.float64, torch.device("cpu"))
    assert tuple(frame.tensors()) == FIELDS
    assert tuple(build(output_mean=None).tensors()) == FIELDS[:-1]
    assert aniso_ext.Frame is Frame


def test_fields_cannot_be_set():
    frame = build()
    for name in (*FIELDS, "complement"):
        with pytest.raises(FrozenInstanceError):
            setattr(frame, name, None)


def test_frames_never_train():
    basis = tensors()["basis"].requires_grad_()
    frame = build(basis=basis)
    assert not frame.basis.requires_grad and basis.requires_grad


def test_equal_content_has_an_equal_fingerprint():
    frame = build()
    assert len(frame.fingerprint()) == 64
    assert build().fingerprint() == frame.fingerprint()
    strided = torch.stack((tensors()["basis"], tensors()["basis"]), dim=-1)[..., 0]
    assert not strided.is_contiguous() and build(basis=strided).fingerprint() == frame.fingerprint()
    assert {frame: 1}[frame] == 1 and frame != build(), "frames are keys by identity"


def nudged(value: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0, dtype=changed.dtype))
    return changed


def test_any_difference_changes_the_fingerprint():
    frame = build()
    others = [build(**{name: nudged(tensors()[name])}) for name in FIELDS]
    others += [
        build(complement="diagonal_projected"),
        build(center=True),
        frame.with_output_mean(None),
        frame.to(dtype=torch.float32),
    ]
    swapped = {"source_mean": tensors()["target_mean"], "target_mean": tensors()["source_mean"]}
    others.append(build(**swapped))
    assert len({f.fingerprint() for f in (frame, *others)}) == 1 + len(others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_has_a_fingerprint(dtype):
    assert build().to(dtype=dtype).fingerprint() == build().to(dtype=dtype).fingerprint()


def test_to_changes_dtype_and_nothing_else():
    frame = build()
    assert frame.to() is frame and frame.to("cpu", torch.float64) is frame
    single = frame.to(dtype=torch.float32)
    assert single.complement == frame.complement and single.dtype == torch.float32
    for name, value in single.tensors().items():
        assert torch.equal(value, frame.tensors()[name].float())
    assert frame.to("meta").device.type == "meta" and frame.dtype == torch.float64


def test_tensors_and_from_tensors_are_inverse():
    frame = build()
    assert Frame.from_tensors(frame.tensors(), complement="diagonal").fingerprint() == frame.fingerprint()


def test_from_tensors_names_what_is_missing_or_unknown():
    given = tensors()
    given["bias"] = given.pop("basis")
    with pytest.raises(InputError, match=r"missing \['basis'\], unknown \['bias'\]"):
        Frame.from_tensors(given, complement="diagonal")
    with pytest.raises(InputError, match=r"missing \['source_mean'\], unknown none"):
        Frame.from_tensors({k: v for k, v in tensors().items() if k != "source_mean"}, complement="diagonal")


def test_calibration_can_be_put_on_and_taken_off_after_use():
    """Operands are kept with a frame; a frame made from it must not inherit them."""
    case = BRANCHES[1]
    frame, y = frame_of(case), rows_of(case, 4)
    calibrated = ops.correct(y, frame)
    plain = ops.correct(y, frame.with_output_mean(None))
    assert torch.equal(plain, ops.correct(y, frame_of(replace(case, calibrated=False))))
    assert (plain - calibrated).abs().max() > 1e-3
    assert torch.equal(ops.correct(y, frame.with_output_mean(None).with_output_mean(frame.output_mean)), calibrated)


def test_a_deep_copy_of_a_used_frame_is_a_frame_of_its_own():
    frame = frame_of(BRANCHES[4])
    y = rows_of(BRANCHES[4], 4)
    expected = ops.correct(y, frame)
    other = copy.deepcopy(frame)
    assert other.basis.data_ptr() != frame.basis.data_ptr()
    assert other.fingerprint() == frame.fingerprint() and torch.equal(ops.correct(y, other), expected)


def test_a_fitted_frame_is_valid_in_every_dtype():
    for case in BRANCHES:
        frame = frame_of(case)
        assert frame.validate() is frame
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            frame.to(dtype=dtype).validate()


def with_value(name: str, position: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    changed = tensors()[name].clone()
    changed[position] = value
    return {name: changed}


INVALID = {
    "nan": (with_value("target_mean", (3,), float("nan")), r"Frame\.target_mean has 1 non-finite values"),
    "infinity": (with_value("output_mean", (0,), float("inf")), r"Frame\.output_mean has 1 non-finite values"),
    "basis not orthonormal": (
        with_value("basis", (0, 0), 2.0),
        r"Frame\.basis is not orthonormal: \|Q\^T Q - I\| reaches",
    ),
    "basis scaled": ({"basis": tensors()["basis"] * (1 + 1e-7)}, "not orthonormal"),
    "decreasing source knots": (with_value("radius_source_knots", (1, 2), 9.0), r"radius_source_knots must .* block 1"),
    "decreasing target knots": (with_value("radius_target_knots", (0, 4), 0.0), r"radius_target_knots must .* block 0"),
    "negative target knots": (
        with_value("radius_target_knots", (1, 0), -0.1),
        r"radius_target_knots must start at 0 or",
    ),
    "zero source knots": (with_value("radius_source_knots", (0, 0), 0.0), r"radius_source_knots must be positive"),
    "negative scale": (with_value("complement_scale", (7,), -0.1), r"complement_scale must not be negative"),
}


@pytest.mark.parametrize("name", INVALID)
def test_values_that_no_fit_gives_are_refused_by_name(name):
    changes, message = INVALID[name]
    with pytest.raises(InputError, match=message):
        build(**changes).validate()


def test_coinciding_knots_and_a_map_from_zero_are_valid():
    flat = tensors()["radius_source_knots"].clone()
    flat[0, 2] = flat[0, 1]
    start = tensors()["radius_target_knots"].clone()
    start[:, 0] = 0
    build(radius_source_knots=flat, radius_target_knots=start).validate()


@pytest.mark.parametrize("operation", [ops.correct, ops.encode])
def test_rows_that_do_not_fit_are_refused(operation):
    frame = build()
    cases = {
        r"y must be a torch\.Tensor, got ndarray": torch.zeros(3, D).numpy(),
        r"y must be \[N, D\], got shape \[8\]": zeros(D),
        r"y must be \[N, D\], got shape \[2, 3, 8\]": zeros(2, 3, D),
        r"y has width 9, but this frame needs D = 8": zeros(3, 9),
        r"y is torch\.int32: pass float16, bfloat16, float32 or float64": zeros(3, D, dtype=torch.int32),
        r"y is torch\.complex64": zeros(3, D, dtype=torch.complex64),
    }
    for message, rows in cases.items():
        with pytest.raises(InputError, match=message):
            operation(rows, frame)


def test_states_and_deltas_that_do_not_fit_are_refused():
    frame, state, deltas = build(), zeros(3, 3 * M + D), zeros(3, 2 * M + D)
    cases = {
        r"state has width 13, but this frame needs 3M \+ D = 14": (state[:, :-1], deltas),
        r"deltas has width 13, but this frame needs 2M \+ D = 12": (state, zeros(3, 13)),
        r"deltas must be \[N, 2M \+ D\], got shape \[12\]": (state, deltas[0]),
        r"state has 3 rows and deltas 2: pass one row of deltas for each state": (state, deltas[:2]),
        r"state is torch\.float32 on cpu, deltas torch\.float64 on cpu": (state, deltas.double()),
        r"state is torch\.float32 on cpu, deltas torch\.float32 on meta": (state, deltas.to("meta")),
        r"deltas is torch\.int64": (state, deltas.long()),
        r"state must be a torch\.Tensor, got list": ([[0.0]], deltas),
    }
    for message, (left, right) in cases.items():
        with pytest.raises(InputError, match=message):
            ops.decode(left, right, frame)


@pytest.mark.parametrize("name", ["a_theta", "a_rho", "a_v"])
@pytest.mark.parametrize("bound", [-0.1, float("nan"), float("inf")])
def test_bounds_must_be_finite_and_not_negative(name, bound):
    with pytest.raises(InputError, match=f"{name} must be finite and not negative, got {bound}"):
        ops.decode(zeros(1, 3 * M + D), zeros(1, 2 * M + D), build(), **{name: bound})


def test_the_default_bound_of_a_coordinate_shrinks_with_the_width():
    """METHOD D12: a_v = 0.1/sqrt(D)."""
    case = BRANCHES[0]
    frame = frame_of(case)
    state, deltas = ops.encode(rows_of(case, 3), frame), torch.ones(3, case.rank + case.width, dtype=torch.float64)
    assert torch.equal(ops.decode(state, deltas, frame), ops.decode(state, deltas, frame, a_v=0.1 / case.width**0.5))
    assert not torch.equal(ops.decode(state, deltas, frame), ops.decode(state, deltas, frame, a_v=0.0))
