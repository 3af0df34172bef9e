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
    "a submodule's second name gets its tensors, too": (
        "network.py", ", tie_weights=False)", ")",
        "test_scan_inputs.py::test_submodules_with_two_names_get_their_tensors_back",
    ),
    "the ends' forwards may differ": (
        "agreement.py", "if gap > _SAME * size:", "if False:",
        "test_scan_inputs.py::test_ends_that_differ_in_more_than_weights_are_refused[ends2-code or attributes differ]",
    ),
    "a small last group scatters like a whole one": (
        "perturbation.py", "whole, weights = rises[sizes == self.m],", "whole, weights = rises,",
        "test_perturbation.py::test_a_small_last_group_counts_by_its_size_in_the_error_too",
    ),
    "the error of labelled images averages out over sets": (
        "stragglers/label_free.py", "Estimate(value, labelled, math", "Estimate(value, labelled / k**0.5, math",
        "test_path_shape.py::test_the_stated_error_of_a_mean_over_sets_is_the_spread_that_repetitions_show[8]",
    ),
    "scans that had weight norm wrong are resumed": (
        "job.py", "if plan.measures and has_weight_norm(self.network.module) else {}", "if False else {}",
        "test_weight_norm.py::test_a_scan_that_had_weight_norm_wrong_is_not_resumed[old]",
    ),
    "globals of a loss are no part of its code": (
        "losses.py", "*captured, *known,", "*captured,",
        "test_scan_inputs.py::test_what_a_loss_reads_and_calls_is_part_of_its_code[global]",
    ),
    "the 1/n is dropped": (
        "objective.py", "batch.targets) / self.examples", "batch.targets)",
        "test_point.py::test_whole_product_is_the_dense_hessian_times_v[mlp-None]",
    ),
    "attention runs fused": (
        "objective.py", "sdpa_kernel(SDPBackend.MATH), ", "",
        "test_point.py::test_whole_product_is_the_dense_hessian_times_v[vit-None]",
    ),
    "weight norm runs fused": (
        "objective.py", ", PlainWeightNorm():", ":",
        "test_weight_norm.py::test_curvature_under_weight_norm_is_that_of_its_formula[new-0]",
    ),
    "gradients are tried at the model's own weights": (
        "soundness.py", "AWAY = 1 / 16", "AWAY = 0",
        "test_soundness.py::test_activation_checkpointing_is_refused_where_gradients_are_taken[again]",
    ),
    "a cache shows by its values only": (
        "caches.py", "if any(tensor.requires_grad for tensor in made):", "if False:",
        "test_models_kept.py::test_what_an_earlier_call_computed_from_weights_is_not_measured_with[dict-measures0]",
    ),
    "asymmetry is thinned out by the number of weights": (
        "soundness.py", "/ size if size", "/ size / norm(u) if size",
        "test_soundness.py::test_asymmetry_is_as_plain_in_a_wide_network[2048]",
    ),
    "a head outlives the text tower it was made of": (
        "models/two_towers.py", "and version == tensor._version", "and version",
        "test_objectives.py::test_the_head_follows_the_text_tower_written_to_in_place_or_exchanged",
    ),
    "SigLIP under CLIP's loss": (
        "pairs.py", "return contrastive if towers.logit_bias is None else sigmoid_contrastive", "return contrastive",
        "test_objectives.py::test_the_loss_is_that_of_the_library[Siglip contrastive]",
    ),
    "what goes on from start vectors is taken over by another rank": (
        "apart.py", "kind in self._spent and kind not in self._memory.bound", "kind in self._spent",
        "test_apart.py::test_what_a_slow_chain_need_not_find_itself_is_found_by_others",
    ),
    "nothing is taken over": (
        "apart.py", "if free and pays and not", "if False and not",
        "test_apart.py::test_what_a_slow_chain_need_not_find_itself_is_found_by_others",
    ),
    "no reorthogonalisation": (
        "curvature/lanczos.py", "for _ in range(2):", "for _ in range(0):",
        "test_lanczos.py::test_reorthogonalisation_keeps_long_runs_free_of_ghosts",
    ),
    "no noise in the start vector": (
        "curvature/lanczos.py", "random * (self.noise / noise)", "random * 0.0",
        "test_lanczos.py::test_a_start_at_the_second_eigenvector_still_finds_the_first",
    ),
    "a search from the gradient stops as soon as it may": (
        "curvature/lanczos.py", "running=1 if sure else 2", "running=1",
        "test_lanczos.py::test_a_gradient_along_the_second_eigenvector_does_not_hide_the_first",
    ),
    "only the leading eigenvector is handed on": (
        "curvature/lanczos.py", "np.maximum(values / values[-1], 0.0) ** 8", "np.eye(len(values))[-1]",
        "test_lanczos.py::test_an_eigenvector_that_takes_the_lead_between_two_alphas_is_seen",
    ),
    "the mean of a norm's slope is forgotten": (
        "curvature/layer_norm.py", "(a * unit).mean(-1, keepdim=True)\n", "0 * (a * unit).mean(-1, keepdim=True)\n",
        "test_smooth.py::test_hessian_products_are_those_of_autograd[anew-norm]",
    ),
    "what a norm keeps is tilted": (
        "curvature/layer_norm.py", "by_x.addcmul_(unit, (c * slope)", "by_x.addcmul_(unit, 0 * (c * slope)",
        "test_smooth.py::test_hessian_products_are_those_of_autograd[kept-norm]",
    ),
    "a compiled part of a model goes by closed forms": (
        "curvature/route.py", "return all(near(*pair, gap)", "return True or all(near(*pair, gap)",
        "test_route.py::test_products_are_those_of_autograd[Compiled]",
    ),
    "a saved tensor holds its own node": (
        "curvature/graphs.py", "return tensor.detach()", "return tensor",
        "test_point.py::test_a_point_that_is_dropped_frees_its_graphs",
    ),
    "a batch's graph is freed though it stays": (
        "curvature/gradient.py", "retain_graph=True", "retain_graph=False",
        "test_point.py::test_product_is_symmetric_and_linear",
    ),
    "a cross block leaks into a layer": (
        "curvature/trace.py", "mine = select(probe, names)", "mine = dict(probe)",
        "test_trace.py::test_diagonal_hessian_is_exact_after_the_first_draws_and_no_own_probes_are_spent",
    ),
    "all batches get the same probe": (
        "curvature/trace.py", "of, draw, number)", "of, draw)",
        "test_trace.py::test_the_stated_error_is_the_spread_of_the_draws_where_all_batches_are_alike",
    ),
    "examples that depend on each other are groups": (
        "curvature/groups.py", "return same and work", "return work",
        "test_groups.py::test_models_whose_examples_are_no_groups_have_none[Mixes]",
    ),
    "an embedding's padding has a gradient": (
        "curvature/groups.py", "if padding not in (None, -1) or scaled:", "if scaled:",
        "test_groups.py::test_what_vmap_leaves_out_of_an_embedding_is_not_left_out[how1]",
    ),
    "what is left to a node is lost": (
        "curvature/passes.py", "node.left = parts", "node.left = None",
        "test_groups.py::test_each_groups_product_is_that_of_the_group_by_itself[smooth-vit-hessian]",
    ),
    "a norm's weight is never asked for": (
        "curvature/layer_norm.py", "if goes_on(ctx, 2) else None", "if False else None",
        "test_groups.py::test_gradient_and_products_with_one_vector_are_those_of_the_batch[smooth]",
    ),
    "a product keeps the scale of the loss": (
        "curvature/gradient.py", "tensor / (scale * shrunk)", "tensor / shrunk",
        "test_half.py::test_gradient_and_products_are_those_of_float64[gelu-1]",
    ),
    "what left float16's range stays": (
        "curvature/graphs.py", "self.exact is None or _finite(found)", "True",
        "test_half.py::test_what_is_not_finite_is_computed_again",
    ),
    "the loss has one scale": (
        "curvature/half.py", "if ROOM[0] <= peak <= ROOM[1]:", "if peak >= 0:",
        "test_half.py::test_the_scale_is_moved_to_where_cotangents_fit[1.0-9.094947017729282e-13]",
    ),
    "half the variance of a probe": (
        "curvature/trace.py", "else 2 * self.spread\n", "else 0.3 * self.spread\n",
        "test_trace.py::test_standard_error_covers_the_truth_as_often_as_it_should",
    ),
    "the Gauss-Newton matrix forgets the loss": (
        "curvature/gauss_newton.py", "(graph.outputs, views, bent", "(graph.outputs, views, graph.moved(live, v, each)",
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
    "a gate takes NaN for a number": (
        "detectors/findings.py", 'if self.verdict != "unmeasured" and not (', "if False and not (",
        "test_gate.py::test_a_verdict_on_nan_cannot_be_given",
    ),
    "a score may lie anywhere": (
        "detectors/findings.py", "return bool(low - rounding <= score <= high + rounding)", "return True",
        "test_gate.py::test_a_score_outside_of_its_own_interval_is_refused[interval0-pass]",
    ),
    "a candidate is judged on the images that picked it": (
        "detectors/images.py", "if not chosen:", "if True:",
        "test_gate.py::test_a_candidate_is_judged_on_images_that_it_was_not_picked_on",
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
    "sixteen bits are clipped": (
        "pictures.py", 'if upright.mode in _DEEP or upright.mode.startswith("I;16"):', "if False:",
        "test_pictures.py::test_sixteen_bits_are_scaled_where_pillow_alone_would_clip_them",
    ),
    "labels keep the numbers of their own set": (
        "scanner.py", ".named(name).numbered_as(id_split.classes)", ".named(name)",
        "test_data.py::test_a_scan_maps_ood_labels_by_name",
    ),
    "an archive cut between two members passes": (
        "shards.py", "if len(rest) < _BLOCK:", "if False:",
        "test_webdataset.py::test_damaged_and_missing_archives_are_refused_by_name[at a boundary]",
    ),
    "random augmentation passes": (
        "loaders.py", "if mark(batch.inputs) != expected:", "if False:",
        "test_data.py::test_random_augmentation_and_unfixed_order_are_seen_at_the_first_reading",
    ),
    "a resumed scan forgets its eigenvectors": (
        "memory.py", "if self.folder is None or not self._path(index).exists():", "if True:",
        "test_scan.py::test_a_scan_cut_after_any_cell_ends_with_the_same_bytes",
    ),
    "alpha is quoted on the half it was chosen on": (
        "stragglers/recommendation.py", "second = {s: h[1]", "second = {s: h[0]",
        "test_decision.py::test_the_quoted_gain_is_not_inflated_by_choosing",
    ),
    "a shared trend counts as evidence": (
        "stragglers/surrogates.py", "drawn[: draws // 2, :TREND] = coefficients[:TREND]", "pass",
        "test_stragglers.py::test_surrogates_are_rearrangements_and_half_keep_the_trend[alphas0]",
    ),
    "forty layers are tested as one": (
        "stragglers/correlation.py", "null.max(axis=0) >= observed", "null.mean(axis=0) >= observed",
        "test_stragglers.py::test_p_values_follow_from_their_definition",
    ),
    "a straggler needs no intervention": (
        "stragglers/wording.py", "return STRAGGLER if supported else BEYOND", "return STRAGGLER",
        "test_stragglers.py::test_only_a_layer_beyond_the_null_whose_move_is_shown_to_harm_is_a_straggler",
    ),
    "a recipe is quoted on the half it was chosen on": (
        "stragglers/recipes.py", "self.second = {split: part[1]", "self.second = {split: part[0]",
        "test_search.py::test_recipes_that_are_no_better_are_seldom_shipped_although_the_luckiest_looks_better",
    ),
    "a random move is longer than the real one": (
        "moves.py", "direction * (length / norm", "direction * (2 * length / norm",
        "test_intervention.py::test_a_random_control_goes_as_far_as_the_move_tensor_by_tensor_and_each_its_own_way[base0]",
    ),
    "a moved module gives its old output": (
        "replay.py", "and self._holds[name].isdisjoint(moved)", "",
        "test_replay.py::test_moving_any_layer_gives_the_bits_of_the_full_forward[mlp-block]",
    ),
    "a module whose input has changed gives its old output": (
        "replay.py", "if known and _same((args, kwargs), calls[index].inputs):", "if known:",
        "test_replay.py::test_no_order_of_execution_is_assumed[gain]",
    ),
    "a move is supported whatever random moves do": (
        "stragglers/standing.py", "self.off_zero and (1", "self.off_zero or (1",
        "test_intervention.py::test_a_move_that_is_one_random_direction_more_is_seldom_supported_however_skewed_they_are",
    ),
    "the real move is not counted among the random ones": (
        "stragglers/standing.py", "(1 + self.as_far) / (1 + max", "self.as_far / (max",
        "test_intervention.py::test_at_most_one_move_in_forty_may_go_as_far_the_real_one_counted[0-38-False]",
    ),
    "random moves are stopped too early": (
        "intervention.py", ".hopeful(self.most)]", ".hopeful(goal)]",
        "test_intervention.py::test_more_random_moves_are_made_until_too_many_go_as_far_and_no_verdict_depends_on_stopping",
    ),
    "the spread over random directions is forgotten": (
        "stragglers/interval.py", "    if len(draws):", "    if False:",
        "test_intervention.py::test_the_intervals_of_effect_and_control_cover_the_truth_as_often_as_they_say",
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
    "a document goes over what is read": (
        "commands/documents.py", "(file for file in read if _same(place, str(file)))", "iter([])",
        "test_documents.py::test_what_is_read_and_the_other_document_are_no_place_for_a_document"
        "[check scan --rules r.toml --json scan/cells.jsonl]",
    ),
    "a pipe is replaced by a file": (
        "commands/documents.py", "(_put if place in files else _write_through)(place", "_put(place",
        "test_documents.py::test_the_reader_of_a_pipe_gets_the_document_and_the_pipe_stays[command0-passed]",
    ),
    "bounds are added like standard errors": (
        "comparison.py", 'one + other if "lambda" in measure else', "",
        "test_comparison.py::test_errors_of_means_add_in_squares_and_bounds_of_eigenvalues_add",
    ),
    "a paired interval forgets the limit": (
        "stragglers/paired.py", "variance = n * (2 * share + gap * (1 - gap))", "variance = n * 2 * share",
        "test_gate_rates.py::test_the_score_statistic_is_that_of_the_restricted_maximum_likelihood",
    ),
    "ignored labels count in the mean of a training's sharpness": (
        "optim/sharpness.py", "cross_entropy(outputs, targets) * self._labelled", "cross_entropy(outputs, targets)",
        "test_optim_audit.py::test_the_mean_is_over_the_labels_that_count",
    ),
    "decisions are dropped with their chunks": (
        "optim/selective.py",
        "self.carry(self.activity())\n        self._plans", "self.activity()\n        self._plans",
        "test_optim_laws.py::test_no_decision_is_lost_where_state_groups_or_the_tensors_with_gradients_change[group]",
    ),
    "means of the same accuracies differ by rounding": (
        "stragglers/correlation.py", ".mean(axis=1).round(12)", ".mean(axis=1)",
        "test_stragglers.py::test_the_same_accuracies_on_other_sets_are_the_same_error",
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
