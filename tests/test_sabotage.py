"""The tests can fail: each one-line breakage of a copy of the package turns a named test red."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what breaks: file, line as it stands, line as it would be wrong, the test that must notice
BREAKAGES = {
    "the 1/n is dropped": (
        "objective.py", "batch.targets) / self.examples", "batch.targets)",
        "test_point.py::test_whole_product_is_the_dense_hessian_times_v[mlp-None]",
    ),
    "attention runs fused": (
        "objective.py", "with sdpa_kernel(SDPBackend.MATH):", "if True:",
        "test_point.py::test_whole_product_is_the_dense_hessian_times_v[vit-None]",
    ),
    "no reorthogonalisation": (
        "curvature/lanczos.py", "for _ in range(2):", "for _ in range(0):",
        "test_lanczos.py::test_reorthogonalisation_keeps_long_runs_free_of_ghosts",
    ),
    "no noise in the start vector": (
        "curvature/lanczos.py", "share = self.noise / norm(random)", "share = 0.0",
        "test_lanczos.py::test_a_start_at_the_second_eigenvector_still_finds_the_first",
    ),
    "a batch's graph is freed though it stays": (
        "curvature/point.py", "retain_graph=stays", "retain_graph=False",
        "test_point.py::test_product_is_symmetric_and_linear",
    ),
    "a cross block leaks into a layer": (
        "curvature/trace.py", "select(image, names))", "image)",
        "test_trace.py::test_diagonal_hessian_is_exact_after_the_first_draws_and_no_own_probes_are_spent",
    ),
    "half the variance of a probe": (
        "curvature/trace.py", "else 2 * spread\n", "else 0.3 * spread\n",
        "test_trace.py::test_standard_error_covers_the_truth_as_often_as_it_should",
    ),
    "the Gauss-Newton matrix forgets the loss": (
        "curvature/gauss_newton.py", "grad(graph.outputs, leaves, bent", "grad(graph.outputs, leaves, moved",
        "test_oracles.py::test_products_whole_and_per_layer[mlp-gauss_newton]",
    ),
    "the adaptive step lacks a scale": (
        "ball.py", "bent = {name: self.scales[name] * g for", "bent = {name: g for",
        "test_perturbation.py::test_ascent_is_the_best_of_the_ball[True-2-2.0]",
    ),
    "NaN gets into a row": (
        "table.py", "if not math.isfinite(self.value) or math.isnan(self.stderr):", "if False:",
        "test_journal.py::test_a_row_cannot_hold_a_number_that_is_none[nan]",
    ),
    "the path is walked backwards": (
        "path.py", "mix(tensor, self.end[name], alpha)", "mix(tensor, self.end[name], 1 - alpha)",
        "test_scan.py::test_both_ends_have_the_dense_curvature_and_the_plain_accuracy[mlp]",
    ),
    "a torn line stays in the file": (
        "journal.py", "os.truncate(path, size)", "pass",
        "test_journal.py::test_a_torn_last_line_is_dropped_at_every_length",
    ),
    "images are paired with the wrong labels": (
        "data.py", "inputs = inputs[place.to(inputs.device)]", "pass",
        "test_data.py::test_a_sample_holds_matching_pairs_and_every_class_evenly",
    ),
    "a resumed scan forgets its eigenvectors": (
        "memory.py", "if self.folder is None or not self._path(index - 1).exists():", "if True:",
        "test_scan.py::test_a_scan_cut_after_any_cell_ends_with_the_same_bytes",
    ),
    "alpha is quoted on the half it was chosen on": (
        "stragglers/recommendation.py", "second = {s: h[1]", "second = {s: h[0]",
        "test_decision.py::test_the_quoted_gain_is_not_inflated_by_choosing",
    ),
    "a merge casts where it should copy": (
        "merging/plan.py", "if alpha == 0.0 and start.dtype == end.dtype:", "if False:",
        "test_merge.py::test_a_not_a_number_keeps_its_bits_at_the_ends",
    ),
    "a merge keeps every tensor": (
        "merging/output.py", "for key in order:\n            _append(file, tensor(key))",
        "for found in [tensor(key) for key in order]:\n            _append(file, found)",
        "test_merge.py::test_a_pair_of_tensors_is_held_at_a_time_and_no_file_stays_mapped[safetensors]",
    ),
    "a merge that failed leaves its scratch": (
        "merging/output.py", "    finally:\n        _remove(beside)", "    finally:\n        pass",
        "test_merge_refusals.py::test_an_error_on_the_way_leaves_the_old_merge_as_it_was",
    ),
    "a merge is written in its place": (
        "merging/output.py", 'target.with_name(f"{target.name}.{os.getpid()}.part")', "target",
        "test_merge_refusals.py::test_a_killed_merge_leaves_a_whole_checkpoint_or_none[False]",
    ),
    "bounds are added like standard errors": (
        "comparison.py", 'one + other if "lambda" in measure else', "",
        "test_comparison.py::test_errors_of_means_add_in_squares_and_bounds_of_eigenvalues_add",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", BREAKAGES)
def test_a_breakage_turns_its_test_red(what, tmp_path):
    name, right, wrong, test = BREAKAGES[what]
    ignored = shutil.ignore_patterns("assets", "__pycache__")
    shutil.copytree(ROOT / "sharpscope", tmp_path / "sharpscope", ignore=ignored)
    broken = tmp_path / "sharpscope" / name
    text = broken.read_text()
    assert text.count(right) == 1, f"{name} no longer holds {right!r} once"
    broken.write_text(text.replace(right, wrong))
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / test)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout, done.stdout


def test_the_copy_is_what_is_tested(tmp_path):
    """Were PYTHONPATH not to win over the installed package, every breakage would go unseen."""
    (tmp_path / "sharpscope").mkdir()
    (tmp_path / "sharpscope" / "__init__.py").write_text("copy = True")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import sharpscope; print(sharpscope.copy)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"
