"""The tests are the grader, so they are graded: a fault is planted in a model, and a test must find it.

A fault is a replacement in the source of a model. The law or the property that finds it is named beside it: its failure
must lead to the fault.
"""
from pathlib import Path

import pytest

import nanomem
from nanomem import grade

HERE = Path(nanomem.__file__).parent

FAULTS = {    # of each file: what stands there, what is put there, and the test that names the fault
    "gpt": [
        ("rope(torch.arange(P, P + x.size(1)", "rope(torch.arange(0, x.size(1)",
         "any_cut_of_a_segment_gives_the_single_call"),
        (".tril(P)", ".tril(P + 1)", "any_cut_of_a_segment_gives_the_single_call"),
        (".tril(P)", ".tril(P - 1)", "any_cut_of_a_segment_gives_the_single_call"),
        ("F.pad(slow, (0, 0, 1, 0))[..., :-1, :]", "F.pad(slow, (0, 0, 0, 1))[..., 1:, :]", "no_token_sees_the_future"),
        ("a * sin + b * cos", "b * cos - a * sin", "rope_multiplies_each_pair_with_a_rotation_matrix"),
        ("rotate(norm(k), angles)", "rotate(k, angles)", "the_model_is_a_loop_over_layers_heads_queries_and_keys"),
        ("(rotate(norm(q), angles) * self.gain)", "rotate(norm(q), angles)", "gradient_reaches_every_parameter"),
        ("torch.cat([old, new.type_as(old)], 2)", "torch.cat([new.type_as(old), old], 2)",
         "any_cut_of_a_segment_gives_the_single_call"),
        ("return x + self.mlp(norm(x)), kv", "return self.mlp(norm(x)), kv",
         "the_model_is_a_loop_over_layers_heads_queries_and_keys"),
        ("is_causal=mask is None and P == 0", "is_causal=mask is None", "any_cut_of_a_segment_gives_the_single_call"),
        ("10_000 ** (-torch.arange", "10_000 ** (torch.arange", "rope_multiplies_each_pair_with_a_rotation_matrix"),
        ("return self.out(h * F.relu(h))", "return self.out(F.relu(h))",
         "the_model_is_a_loop_over_layers_heads_queries_and_keys"),
    ],
    "xl": [
        ("(j <= i) & (j >= first)", "(j <= i + 1) & (j >= first)", "any_cut_of_a_segment_gives_the_single_call"),
        ("c.kept - n.clamp(max=c.W)", "c.kept - n", "transformer_xl_sees_its_segment_and_the_w_tokens_before_it"),
        ("torch.full((1,), -gone", "torch.full((1,), gone",
         "the_cache_is_the_last_w_and_one_keys_and_values_at_positions_0_to_w"),
        ('else state["kv"].detach()', 'else state["kv"]',
         "transformer_xl_stops_the_gradient_at_its_cache_and_a_sliding_window_does_not"),
        ("back), v[:, :, gone:]]", "back), v[:, :, :-gone]]",
         "the_cache_is_the_last_w_and_one_keys_and_values_at_positions_0_to_w"),
        ("(j <= i + W)", "(j < i + W)", "a_sliding_window_is_one_pass_with_a_banded_mask"),
        ("(n + S).clamp(max=kept)", "(n + S - 1).clamp(max=kept)", "only_the_filled_part_of_the_cache_is_seen"),
        ("position = P - W + torch", "position = P - W + 1 + torch", "a_sliding_window_is_one_pass_with_a_banded_mask"),
    ],
    "rmt": [
        ("ids=ids.clone())", 'ids=state["ids"].clone())', "any_cut_of_a_segment_gives_the_single_call"),
        ("ids=tokens[:, S - c.k:].clone())", "ids=tokens[:, S - c.k:])", "the_state_is_a_flat_dict_of_fixed_shape"),
        ("mem=self.mem.expand", "mem=self.mem.detach().expand", "gradient_reaches_every_parameter"),
        ("self.embed(ids.clamp(min=0)) * (ids >= 0)[..., None]", "self.embed(ids.clamp(min=0))",
         "a_segment_is_one_causal_pass_over_memory_sensory_tokens_memory"),
        ("[:, tokens.size(1):], cache)", "[:, :-tokens.size(1)], cache)", "any_cut_of_a_segment_gives_the_single_call"),
        ("mem=after.to(mem.dtype, copy=True)", "mem=after.detach().to(mem.dtype, copy=True)",
         "gradient_reaches_back_through_the_window_and_no_further"),
        ("dict(mem=after.to(mem.dtype, copy=True)", "dict(mem=mem.clone()",
         "any_cut_of_a_segment_gives_the_single_call"),
    ],
    "hmt": [
        ("-torch.inf).softmax(-1)", "-torch.inf).softmax(1)", "what_is_found_lies_between_the_memories_it_is_mixed_of"),
        ("* c.width ** -0.5", "* c.width ** 0.5", "a_segment_is_one_causal_pass_with_what_the_slow_search_finds"),
        ("< c.bank - n", "<= c.bank - n",
         "a_segment_is_one_causal_pass_with_what_the_slow_search_finds"),
        ('state["bank"][:, 1:]', 'state["bank"][:, :-1]', "the_oldest_memory_leaves_the_bank"),
        ("1))[0][:, -1]  # eq. 1", "1))[0][:, -2]  # eq. 1",
         "a_segment_is_one_causal_pass_with_what_the_slow_search_finds"),
        ("self.key.load_state_dict(self.query.state_dict())", "self.init(self.key)",
         "a_new_search_finds_what_is_like_the_query"),
        ("count[:self.c.j - 1]", "count[:self.c.j - 2]",
         "the_published_query_leaks_and_the_positions_that_leak_are_not_scored"),
        ("self.mem[None]]).expand", "self.mem[None].detach()]).expand", "gradient_reaches_every_parameter"),
        ("tensor_split([self.c.j - before], 1)", "tensor_split([self.c.j], 1)",
         "any_cut_of_a_segment_gives_the_single_call"),
    ],
    "memformer": [
        ("(self.c.tau * self.c.head_dim ** 0.5)", "self.c.tau",
         "a_slot_attends_to_itself_and_the_tokens_in_a_loop_and_in_one_masked_call"),
        ("** 0.5)).softmax(-1)", "** 0.5)).softmax(-2)",
         "a_slot_attends_to_itself_and_the_tokens_in_a_loop_and_in_one_masked_call"),
        ("norm(z + self.v)", "norm(z - self.v)",
         "a_slot_attends_to_itself_and_the_tokens_in_a_loop_and_in_one_masked_call"),
        ("norm(z + self.v)", "z + self.v", "slots_keep_their_norm_for_a_thousand_segments"),
        ("w[..., :1] * split_heads(mem", "w[..., :1] * split_heads(self.value(mem)",
         "a_slot_attends_to_itself_and_the_tokens_in_a_loop_and_in_one_masked_call"),
        ("reader(norm(x), slots_kv)", "reader(x, slots_kv)",
         "a_block_is_attention_then_the_memory_then_an_mlp_each_of_a_norm"),
        ("h = new if h is None else torch.cat([h, new], 1)", "h = new", "any_cut_of_a_segment_gives_the_single_call"),
        ("ids[:, self.c.seg:].clone()", "ids[:, :self.c.seg].clone()",
         "back_sees_the_segment_before_and_nothing_older_but_through_memory"),
        ("with full_precision(h):", "if True:", "the_writer_computes_in_full_precision_under_autocast"),
        ("causal & (ids >= 0)[:, None, None]", "causal[None, None]",
         "back_sees_the_segment_before_and_nothing_older_but_through_memory"),
    ],
    "memoryllm": [
        (".tril(t)", ".tril(t + 1)", "no_token_sees_the_future"),
        ('F.pad(state["birth"][:, l] >= 0', 'F.pad(state["birth"][:, l] > 0',
         "a_read_is_one_softmax_over_found_start_pool_and_segment"),
        ("torch.arange(end - vectors.size(1), end,", "torch.arange(vectors.size(1),",
         "a_read_is_one_softmax_over_found_start_pool_and_segment"),
        ("torch.cat([inputs, x], 1).detach()", "torch.cat([inputs, x], 1)",
         "the_search_learns_from_its_own_loss_and_nothing_else_does"),
        ('state["pool"][:, :, c.N - c.K:].detach()', 'state["pool"][:, :, c.N - c.K:]',
         "gradient_goes_one_write_deep_and_never_into_the_store"),
        ("block(x + marker,", "block(x,", "gradient_reaches_every_parameter"),
        ("new.append(x[:, S - c.K:])", "new.append(x[:, :c.K])",
         "a_write_puts_the_last_k_tokens_of_every_layer_at_the_end_of_its_pool"),
        ("step[:, None, None] * c.K + torch", "step[:, None, None] + torch",
         "a_write_drops_k_of_each_layer_and_keeps_the_order_of_the_others"),
        ("self.table[step % TABLE]", "self.table[step * 0]",
         "a_vector_survives_t_writes_with_probability_1_minus_k_over_n_to_the_t"),
        ("kept.sort()[0]", "kept", "a_write_drops_k_of_each_layer_and_keeps_the_order_of_the_others"),
    ],
    "mplus": [
        (".masked_fill(birth < 0, -1)", "", "a_read_is_one_softmax_over_found_start_pool_and_segment"),
        (".topk(self.c.K0)[1]", ".topk(self.c.K0, largest=False)[1]",
         "the_best_are_found_and_come_oldest_first_however_they_are_stored"),
        ("birth.gather(1, best).sort()", "birth.gather(1, best).sort(descending=True)",
         "the_best_are_found_and_come_oldest_first_however_they_are_stored"),
        ("oldest < birth, {}", "oldest > birth, {}", "the_store_keeps_the_youngest_of_all_that_was_dropped"),
        ("self.f_k(dropped).detach()", "self.f_k(dropped.flip(2)).detach()",
         "the_key_of_every_stored_vector_is_its_projection"),
        ("self.move_to_store(dropped.detach(),", "self.move_to_store(dropped,",
         "gradient_goes_one_write_deep_and_never_into_the_store"),
        ("-torch.inf).softmax(-1)", "-torch.inf).softmax(-2)",
         "the_loss_wants_what_attention_looks_at_and_nothing_else"),
        (".to(key.dtype).sigmoid().mean(1)", ".to(key.dtype).mean(1).sigmoid()",
         "the_best_are_found_and_come_oldest_first_however_they_are_stored"),
        ("mean(-(1 - s + 1e-5).log(), wrong)", "mean(-(s + 1e-5).log(), wrong)",
         "the_loss_wants_what_attention_looks_at_and_nothing_else"),
        ("self.c.m:].detach()", "self.c.m:]", "gradient_goes_one_write_deep_and_never_into_the_store"),
        ("> 3 / c.N", "> 1 / c.N", "the_loss_wants_what_attention_looks_at_and_nothing_else"),
        ("self.c.m - 1 if self.c.M", "self.c.m - 2 if self.c.M",
         "a_segment_that_searches_for_itself_leaks_into_its_first_tokens_only"),
    ],
    "mamba": [
        ("(A - A.mT).tril().exp().tril()", "(A - A.mT).exp().tril()", "strong_decays_overflow_nowhere"),
        ("-dt * self.log_A.exp()", "dt * self.log_A.exp()",
         "each_token_says_what_is_written_how_it_is_read_and_how_much_fades"),
        ("A.exp() * (c @ h.mT)", "(c @ h.mT)", "the_loop_the_steps_and_the_matrix_products_are_one_map"),
        ("h = a.exp() * h + dt", "h = h + dt", "the_loop_the_steps_and_the_matrix_products_are_one_map"),
        ("line[:, T:]", "line[:, T - 1:-1]", "the_convolution_ties_a_token_to_the_three_before_it"),
        ("norm(b), norm(c)", "b, c", "each_token_says_what_is_written_how_it_is_read_and_how_much_fades"),
        ("* F.silu(z)", "", "each_token_says_what_is_written_how_it_is_read_and_how_much_fades"),
        ("h = end.exp() * h", "h = h", "the_loop_the_steps_and_the_matrix_products_are_one_map"),
        ("u + sum(taps[i]", "sum(taps[i]", "the_convolution_ties_a_token_to_the_three_before_it"),
    ],
    "deltanet": [
        ("r = u - b * A.exp()", "r = u + b * A.exp()", "chunks_are_the_loop_over_tokens"),
        ("F.normalize(k, dim=-1)", "F.normalize(k, dim=-2)",
         "each_token_says_what_is_stored_how_it_is_asked_for_and_how_much_fades"),
        ("b.sigmoid().mT", "b.mT", "each_token_says_what_is_stored_how_it_is_asked_for_and_how_much_fades"),
        ("o.append(A.exp() * (q @ h.mT)", "o.append((q @ h.mT)", "chunks_are_the_loop_over_tokens"),
        ("type_as(b) + self.dt_bias", "type_as(b) - self.dt_bias",
         "each_token_says_what_is_stored_how_it_is_asked_for_and_how_much_fades"),
        ("(A - A.mT).tril().exp().tril()", "(A - A.mT).exp().tril()", "strong_decays_overflow_nowhere"),
        ('qkv, memory["conv"] = short_conv(', "qkv, _ = short_conv(", "any_cut_of_a_segment_gives_the_single_call"),
        ("o = norm(o).transpose", "o = o.transpose",
         "each_token_says_what_is_stored_how_it_is_asked_for_and_how_much_fades"),
    ],
    "infini": [
        ("total.where(total > 0, 1)", "total", "an_empty_memory_reads_as_zero_and_has_finite_gradients"),
        ("v = v - recall(k, M, z)", "v = v + recall(k, M, z)",
         "the_delta_update_is_a_loop_over_the_tokens_of_a_segment"),
        ("gate * memory + (1 - gate) * local", "(1 - gate) * memory + gate * local",
         "a_closed_gate_is_gpt_and_an_open_one_sees_no_segment"),
        ("z + positive(k).sum(2)", "z + positive(k).mean(2)",
         "the_linear_memory_is_attention_to_all_earlier_tokens_without_a_softmax"),
        ("recall(q.type_as(M), M, z)", "recall(rotate(q, angles).type_as(M), M, z)",
         "the_memory_answers_a_token_alike_at_every_position"),
        ("for _, v, k, M, z in cache", "for k, v, _, M, z in cache", "the_memory_knows_no_positions"),
        ("return F.elu(x) + 1", "return F.elu(x)", "the_weights_are_positive"),
    ],
    "titans": [
        ("min(1, 2 / c.chunk / c.depth)", "1", "a_text_of_equal_tokens_does_not_blow_up"),
        ("[(k @ w[0].mT - v, k)]", "[(v - k @ w[0].mT, k)]", "chunks_in_matrix_products_are_a_loop_over_tokens"),
        ("if i > 0 or P % c.chunk == 0:", "if True:", "any_cut_of_a_segment_gives_the_single_call"),
        ("[causal] * (1 + mac)", "[causal.new_ones(T, P + T), causal][1 - mac:]", "no_token_sees_the_future"),
        ('self.memory.ask(z, memory["before"]) if mac', 'self.memory.ask(z, after["w"]) if mac',
         "no_token_sees_the_future"),
        ("key=line[:, :, -1:])", "key=line[:, :, :1])", "any_cut_of_a_segment_gives_the_single_call"),
        ("theta.sigmoid() * (1 - log_eta.exp())", "theta.sigmoid()", "a_text_of_equal_tokens_does_not_blow_up"),
        ("y = f0 * (inputs @ w.mT) + fe0 *", "y = f0 * (inputs @ w.mT) - fe0 *",
         "chunks_in_matrix_products_are_a_loop_over_tokens"),
        ("F.logsigmoid(-alpha)", "F.logsigmoid(alpha)",
         "a_token_says_how_far_its_step_goes_how_much_momentum_stays_and_what_fades"),
    ],
    "bmojo": [
        ("(p > t - W) & (p <= t)", "(p >= t - W) & (p <= t)", "the_chunks_are_the_definition"),
        ("(p > t - 2 * W) & (p <= t - W)", "(p > t - 2 * W) & (p <= t)", "the_chunks_are_the_definition"),
        ("line[:, i:i + T]", "line[:, i + 1:i + 1 + T]",
         "the_innovation_is_the_distance_from_the_mean_of_the_three_outputs_before"),
        (".topk(self.M, 1)", ".topk(self.M, 1, largest=False)", "the_buffer_is_a_running_heap"),
        ("window[:, self.c.past:]], 1)", "window[:, :W]], 1)", "the_chunks_are_the_definition"),
        ("(p <= t - W) & (p >= 0)", "(p <= t - W)", "the_chunks_are_the_definition"),
        ("rope(positions - 1, D)", "rope(positions, D)", "the_chunks_are_the_definition"),
        ("v], 2), line[:, -1:]", "v], 2), line[:, :1]", "any_cut_of_a_segment_gives_the_single_call"),
        ("kinds[l % len(kinds)]", "kinds[0]", "a_hybrid_alternates_attention_and_state_space"),
    ],
    "gca": [
        ("(ids < reader - 1)", "(ids < reader)", "a_chunk_is_read_from_the_second_chunk_after_it_on"),
        (" & (ids >= end - c.M)", "", "a_bank_that_overflows_within_a_call_shows_every_segment_what_it_held_by_then"),
        ("score = score.gather(2, top)", "score = best.masked_fill(best == -torch.inf, 0)",
         "noise_explores_in_training_only_and_repeats"),
        ("return z[:, :, c.m],", "return z[:, :, 0],",
         "a_chunk_is_encoded_once_both_ways_with_its_key_at_the_landmark"),
        ("if self.training or c.retrieval", "if True or c.retrieval", "noise_explores_in_training_only_and_repeats"),
        ("newest(near, c.kept)", "newest([(k, k) for k, v in near], c.kept)", "segments_of_any_length_are_one_pass"),
        ("self.find(ask[:, :n]", "self.find(ask[:, -n:]", "no_token_sees_the_future"),
        ("(x if c.bypass else with_chunks)", "with_chunks",
         "what_is_retrieved_goes_into_the_mlp_only_unless_there_is_no_bypass"),
        (".softmax(-1) * real", ".softmax(-1)", "the_chunks_found_are_the_k_best_of_those_that_are_kept"),
        ('cache["key"][:, new:].clone()', 'cache["key"][:, new:]', "the_state_is_a_flat_dict_of_fixed_shape"),
        ("torch.ones(U, U, dtype=torch.bool, device=h.device)",
         "torch.ones(U, U, dtype=torch.bool, device=h.device).tril()",
         "a_chunk_is_encoded_once_both_ways_with_its_key_at_the_landmark"),
    ],
    "landmark": [
        ("score.softmax(-1)", "score.sigmoid()", "the_tokens_of_a_block_share_the_weight_of_its_landmark"),
        ("block >= i // l", "block > i // l",
         "attention_in_a_segment_is_the_grouped_softmax_of_the_paper"),
        ("(token > i)", "(token >= i)", "attention_in_a_segment_is_the_grouped_softmax_of_the_paper"),
        (".topk(self.c.topk, 3)", ".topk(self.c.topk, 3, largest=False)",
         "each_query_and_head_gets_the_k_best_blocks_fetched_or_from_the_whole_bank"),
        ('.masked_fill(age > state["n"][:, None], -torch.inf)[:', '.expand(len(state["n"]), -1)[:',
         "each_query_and_head_gets_the_k_best_blocks_fetched_or_from_the_whole_bank"),
        ("* -c.l, c.head_dim)    # (s", "* c.l, c.head_dim)    # (s",
         "the_bank_holds_the_newest_blocks_with_keys_that_count_from_their_own_beginning"),
        ("[:, :, :, c.s:].clone()", "[:, :, :, c.s:]", "the_state_is_a_flat_dict_of_fixed_shape"),
        ("age.clamp(max=c.topk + 1) * -c.l", "age.clamp(max=c.topk + 1) * c.l",
         "if_all_blocks_are_retrieved_segments_are_one_text"),
        ('n=state["n"] + c.s', 'n=state["n"] + 1',
         "the_bank_holds_the_newest_blocks_with_keys_that_count_from_their_own_beginning"),
    ],
    "stream": [
        ("for k, v in leaf.items() if v.grad is not None}", "for k, v in leaf.items() if v.grad is not None and 0}",
         "replay_gives_the_gradients_of_bptt"),
        ("learned = [k for k in grad if start[k].requires_grad]", "learned = []", "replay_gives_the_gradients_of_bptt"),
        ("torch.where(fresh.to(start.device)", "torch.where(~fresh.to(start.device)",
         "a_fresh_element_starts_from_nothing_and_the_others_go_on"),
        ("model.write(self.cache, self.state)", "model.write(self.cache, model.init_state(len(tokens)))",
         "a_reader_predicts_what_the_loop_predicts"),
        ('state["aux"].mean() * share / parts', 'state["aux"].mean() * share',
         "a_loss_of_the_mechanism_itself_counts_in_both"),
    ],
}
ALL = [(model, *fault) for model, faults in FAULTS.items() for fault in faults]


def plant(model, old, new, folder):
    """The path of a file with the fault. What is replaced must stand there once: a fault cannot become stale unseen."""
    source = (HERE / ("stream.py" if model == "stream" else f"models/{model}.py")).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {model}.py"
    path = folder / f"{model}.py"
    path.write_text(source.replace(old, new))
    return path


def test_every_fault_can_be_planted(tmp_path):
    for model, old, new, _ in ALL:
        path = plant(model, old, new, tmp_path)
        compile(path.read_text(), str(path), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("model, old, new, test", ALL)
def test_a_fault_is_found_by_the_test_that_names_it(model, old, new, test, tmp_path):
    report = grade.check(plant(model, old, new, tmp_path), only=test)
    assert report["failed"], f"{test} does not find {new!r} in the place of {old!r}"
