"""The mistakes that mutants.py plants, and the build that has to find each of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """In `file` of csrc: each first text becomes the second one."""

    what: str
    file: str
    edits: tuple[tuple[str, str], ...]
    flavour: str = "plain"
    dtype: str = "float"  # whose kernels have it


def in_file(file: str, *mistakes: tuple[str, ...]) -> list[Mistake]:
    """Of (what, right text, wrong text[, flavour[, dtype]])."""
    return [Mistake(what, file, ((right, wrong),), *rest) for what, right, wrong, *rest in mistakes]


BARRIERS = [
    *in_file(
        "cuda/team.cuh",
        (
            "no barrier before the warps' sums are read",
            "  __syncthreads();\n  if (warp != 0) return;",
            "  if (warp != 0) return;",
        ),
        (
            "no barrier before a group's sums are read",
            "scratch.counts()[at] = mine->count;\n    }\n    __syncthreads();",
            "scratch.counts()[at] = mine->count;\n    }",
        ),
        (
            "no barrier before the tree is written again",
            "Rule::merge(mine, other);\n    }\n    __syncthreads();",
            "Rule::merge(mine, other);\n    }",
        ),
        (
            "no barrier before a channel's columns are read",
            "if (walk.cell() == 0) scratch.counts()[0] = mine.count;\n  }\n  __syncthreads();",
            "if (walk.cell() == 0) scratch.counts()[0] = mine.count;\n  }",
        ),
        (
            "the grid's barrier is only a block's",
            "      grid_barrier();\n      if",
            "      __syncthreads();\n      if",
        ),
        (
            "no barrier before totals are read",
            "sum_up<Rule>(unit);\n      grid_barrier();",
            "sum_up<Rule>(unit);\n      __syncthreads();",
        ),
        (
            "no barrier before the next channel is summed up",
            "in_workspace(0) + c * kPartialValues);\n      __syncthreads();",
            "in_workspace(0) + c * kPartialValues);",
            "tsan",  # so small a team gives warp 0 alone something to sum up
        ),
        (
            "partial results are not out when the cluster meets",
            "      cluster_arrive();\n",
            "      cluster_arrive_relaxed();\n",
            "tsan",
        ),
        (
            "the cluster's barrier is only a block's",
            "      cluster_arrive();\n      cluster_wait();",
            "    __syncthreads();",
        ),
        (
            "no barrier of the block between the passes",
            "else {\n      __syncthreads();",
            "else {",
        ),
        (
            "no barrier after the last results were gathered",
            "(Strategy strategy) {\n  __syncthreads();\n  if (strategy == Strategy::kCluster) cl",
            "(Strategy strategy) {\n  if (strategy == Strategy::kCluster) cl",
        ),
        (
            "no barrier at the end of a wave",
            "cluster_wait();\n  __syncthreads();",
            "cluster_wait();",
        ),
    ),
    Mistake(
        "blocks of a cluster leave before others have read their results",
        "cuda/team.cuh",
        (
            ("if (strategy == Strategy::kCluster) cluster_arrive_relaxed();", ""),
            ("if (strategy == Strategy::kCluster) cluster_wait();", ""),
        ),
    ),
    *in_file(
        "cuda/backward_kernels.cuh",
        (
            "no barrier after the channels' values were prepared",
            "gradients.prepare(own);\n    __syncthreads();",
            "gradients.prepare(own);",
        ),
        (
            "no barrier after slopes and offsets were written",
            "finals[4];\n      }\n    }\n    __syncthreads();",
            "finals[4];\n      }\n    }",
        ),
    ),
]

SUMS = [
    *in_file(
        "cuda/partials.cuh",
        ("Chan's weight has the other's count twice", "into->count * share", "other.count * share"),
        ("Chan's share is that of the other", "other.count / count;", "into->count / count;"),
        ("the count is not merged", "    into->count = count;", ""),
        (
            "a cell's missing elements are counted",
            "A(kCells * valid)",
            "A(kCells * kCellElements)",
        ),
        (
            "a cell's missing elements deviate",
            "if (e < valid) chunk.second[l] =",
            "chunk.second[l] =",
        ),
        ("the mean of cells is their sum", "chunk.first[l] *= each;", "chunk.first[l] *= A(1);"),
    ),
    *in_file(
        "cuda/team.cuh",
        ("half of a warp's lanes are left out", "distance = width / 2;", "distance = width / 4;"),
        (
            "sums come from the wrong lane",
            "partial->first[0], distance, width",
            "partial->first[0], distance + 1, width",
        ),
        ("the last block's results are left out", "rank < parts;", "rank < parts - 1;"),
        (
            "of a large team's results the last is left out",
            "rank < g_.team; rank += 32",
            "rank < g_.team - 1; rank += 32",
        ),
        (
            "a warp's channels are its lane 0's",
            "if (lane_of_warp() == turn)",
            "if (lane_of_warp() == 0)",
        ),
        (
            "a warp's channels are another's",
            "warp_of_block() + lane_of_warp() * kWarps",
            "static_cast<int>(threadIdx.x)",
        ),
        (
            "a total leaves out a block's results",
            "rank < g_.team; rank += kCudaThreads",
            "rank < g_.team - 1; rank += kCudaThreads",
        ),
        (
            "every block sums up the same channels",
            "int c = unit.rank; c < unit.channels",
            "int c = 0; c < unit.channels",
        ),
        (
            "a team's results lie in one place",
            "(team * g_.team + rank) * g_.unit_channels",
            "(team + rank) * g_.unit_channels",
        ),
        ("results of the next wave come too early", "wave_ % 2 : wave_", "0 : wave_"),
        (
            "scratch regions overlap",
            "return partials() + sizes().partials;",
            "return partials() + 1;",
        ),
        (
            "a group of rows too few in the tree",
            "if (walk.group() + half < live)",
            "if (walk.group() + half < live - 1)",
        ),
        ("rows of an odd number of groups are lost", "(live + 1) / 2", "live / 2"),
        (
            "a column of a channel is left out",
            "for (int j = lane; j < each;",
            "for (int j = lane; j < each - 1;",
        ),
    ),
]

WALKS = [
    *in_file(
        "cuda/geometry.cuh",
        ("the last unit has too many channels", "left < g.unit_channels ? left : ", "", "asan"),
        ("a step too many", "(end - 1 - first) / step", "(end - first) / step"),
        ("the next plane begins a cell late", "if (cell_ >= cells_)", "if (cell_ > cells_)"),
        ("backwards, the first cell is skipped", "if (cell_ < 0)", "if (cell_ <= 0)"),
        ("a plane's tail is a whole cell", "min(left, kWhole)", "kWhole"),
        ("a row's tail is a whole cell", "min(width_ - column_, kCellElements)", "kCellElements"),
        (
            "threads beyond the last group work too",
            "group_ < groups_ ? steps",
            "true ? steps",
            "tsan",  # their sums are not read, and they write what others write
        ),
        (
            "the mask's rows are not padded",
            "first ? p.c * columns / kCellElements : mask_row_bytes(p)",
            "p.c * columns / kCellElements",
        ),
        (
            "lanes beyond the last column have channels of their own",
            "(column < width_ ? column : width_ - 1)",
            "column",
            "asan",
        ),
        (
            "cells that are no full visit are left out",
            "    for (; i < count; ++i) visit",
            "    if (false) visit",
        ),
    ),
    *in_file(
        "cuda/cell.cuh",
        ("loads go beyond the tail", "e < valid ? from[e] : T{}", "from[e]", "asan"),
        ("stores go beyond the tail", "if (e < valid) to[e] =", "to[e] ="),
        ("a slot too many is used", "return cell < count_;", "return cell <= count_;"),
        ("slots of two tensors collide", "(cell * kTensors + tensor)", "(cell + tensor)"),
    ),
    *in_file(
        "core/plan_cuda.cpp",
        (
            "a slot too little shared memory",
            "plan.slots * slot_bytes() + scratch_bytes()",
            "std::max(plan.slots - 1, 0) * slot_bytes() + scratch_bytes()",
            "asan",
        ),
        (
            "workspace for one wave only",
            "return 2 * plan.units_at_once",
            "return plan.units_at_once",
            "asan",
        ),
        (
            "workspace for one wave of two kernels",
            "return plan.units * unit",
            "return plan.units_at_once * unit",
            "asan",
        ),
        ("vectors of unaligned tensors", "vector = request.aligned && row", "vector = row"),
        ("vectors of rows that are no multiple", "row % kCellElements == 0", "row > 0"),
        ("a cluster of any size is taken", "clusters(size) == 0", "false"),
        (
            "a cumulative average in blocks that never meet",
            "!request.cumulative || units() == 1",
            "true",
        ),
    ),
    *in_file(
        "core/plan_cuda.h",
        (
            "a tree for half of the threads",
            "kHalf = kCudaThreads / 2;",
            "kHalf = kCudaThreads / 4;",
        ),
    ),
]

FORMULAS = [
    *in_file(
        "cuda/forward_kernels.cuh",
        ("the normalising variance is unbiased", "sqrt(m2 / n +", "sqrt(m2 / (n - 1) +"),
        (
            "every block of a team updates the statistics",
            " && unit.rank == 0) forward",
            ") forward",
        ),
        ("the mean is that of x - shift", "static_cast<double>(widen(parameters.first))", "0.0"),
        (
            "weight and bias are exchanged",
            "{load_raw(a_.call.weight, c), load_raw(a_.call.bias, c)",
            "{load_raw(a_.call.bias, c), load_raw(a_.call.weight, c)",
        ),
        (
            "the counter is incremented in every wave",
            "wave == 0 && blockIdx.x == 0",
            "blockIdx.x == 0",
        ),
        (
            "the counter is incremented by every block",
            "blockIdx.x == 0 && threadIdx.x == 0",
            "threadIdx.x == 0",
        ),
        ("the counter is not incremented", "++*a.call.running.num_batches_tracked;", ";"),
        (
            "the counter is read too late",
            "forward.record(own, batch, momentum);",
            "forward.record(own, batch, momentum_of(a));",
        ),
        ("invstd is not written", "    if (call.invstd) call.invstd[c] = batch.invstd;\n", ""),
        (
            "the mask's bits beyond a row are set",
            "call.activation, z) & existing",
            "call.activation, z)",
        ),
        (
            "the shift is another channel's",
            "first_element(walk_.channel_of(l))",
            "first_element(0)",
        ),
        (
            "the running variance of inference has no eps",
            "1 / sqrt(variance + a_.call.eps)",
            "1 / sqrt(variance)",
            "plain",
            "double",
        ),
        ("y has no residual", "call.residual != nullptr, residual);", "false, residual);"),
    ),
    Mistake(
        "the residual is added after the activation",
        "cuda/forward_kernels.cuh",
        (
            ("call.residual != nullptr, residual);", "false, residual);"),
            (
                "const Values<A> y =\n        activate<T, kSmooth>(call.activation, z, "
                "static_cast<A>(call.activation_param));",
                "Values<A> y = activate<T, kSmooth>(call.activation, z, "
                "static_cast<A>(call.activation_param));\n"
                "if (call.residual) for (int e = 0; e < kCellElements; ++e) "
                "y.value[e] += widen(residual.element[e]);",
            ),
        ),
    ),
    *in_file(
        "cuda/backward_kernels.cuh",
        ("the slope has the wrong sign", "slope = -saved.invstd", "slope = saved.invstd"),
        ("the offset is dropped", "-dbias / n - lost_of", "-lost_of"),
        (
            "the center's rounding is lost in the sum",
            "total.second[0] - lost_of(channel, saved) * dz;",
            "total.second[0];",
        ),
        ("the center's rounding is lost in the offset", " - lost_of(channel, saved) * slope", ""),
        (
            "the totals of weight and bias are exchanged",
            "totals[all + c], totals[c]",
            "totals[c], totals[all + c]",
        ),
        (
            "the totals are not used",
            "    if (own >= 0 && a.call.totals) gradients.use_totals(own, saved);\n",
            "",
        ),
        ("dresidual is dy", "narrow<T>(dz), place", "cells.dy, place"),
        ("inference has the terms of training", "if (call.training) inner", "inner"),
        (
            "dweight has no invstd",
            "store_value(call.dweight, c, saved.invstd * dz",
            "store_value(call.dweight, c, dz",
        ),
        ("offsets lie on slopes", "kCellElements * walk.tree_threads()", "kCellElements"),
    ),
    *in_file(
        "cuda/launch_statistics.cu",
        ("a combination counts no batch", "++*a.running.num_batches_tracked;", ";"),
        ("a combined variance has no eps", "sqrt(a.var[c] + a.eps)", "sqrt(a.var[c])", "plain"),
    ),
    *in_file(
        "core/calls.h",
        (
            "a rank is left out",
            "Moments all;\n    for (std::int64_t rank = 0;",
            "Moments all;\n    for (std::int64_t rank = 1;",
        ),
    ),
    *in_file(
        "cuda/channel_values.cuh",
        (
            "the running variance is biased",
            "batch.m2 / (batch.count - 1)",
            "batch.m2 / batch.count",
        ),
        (
            "momentum is swapped",
            "(1 - momentum) * before + momentum * batch",
            "momentum * before + (1 - momentum) * batch",
        ),
        (
            "running statistics take what is not finite",
            "  if (!running.are_moved_by(batch)) return;\n",
            "",
        ),
        (
            "one value moves the running variance",
            "  if (batch.count <= 1) return;\n",
            "",
        ),
        (
            "strides of channels' values are not used",
            "if (!values.data) return {0};\n  const std::int64_t at = channel * values.stride;",
            "if (!values.data) return {0};\n  const std::int64_t at = channel;",
        ),
        (
            "the mean's rounding is lost",
            "(static_cast<double>(center) - mean) * slope",
            "0 * slope",
        ),
    ),
    *in_file(
        "cuda/activations.cuh",
        (
            "the mask's bits are in the wrong order",
            "round_to<T>(z.value[e]))) << e;",
            "round_to<T>(z.value[e]))) << (7 - e);",
        ),
        (
            "the mask is of z before rounding",
            "!Act::drops(round_to<T>(z.value[e]))",
            "!Act::drops(z.value[e])",
            "plain",
            "bfloat16",
        ),
        ("relu6 keeps its upper bound", "z <= A(0) || z >= A(6)", "z <= A(0) || z > A(6)"),
        (
            "relu keeps 0",
            "static bool drops(A z) {\n    return z <= A(0);",
            "static bool drops(A z) {\n    return z < A(0);",
        ),
        ("leaky relu keeps nan", "!(z > A(0));  // nan too", "z <= A(0);"),
        ("relu drops nan", "return v <= A(0) ? A(0) : v; });", "return v > A(0) ? v : A(0); });"),
        (
            "leaky relu's slope is left out of its gradient",
            "kLeakyRelu ? param : A(0)",
            "kLeakyRelu ? A(0) : A(0)",
        ),
        (
            "the tanh form's slope is wrong",
            "A(kTwiceRoot * 3 * 0.044715)",
            "A(kTwiceRoot * 2 * 0.044715)",
        ),
        ("elu's derivative has no alpha", "A(1) : alpha * exp_of(z)", "A(1) : exp_of(z)"),
    ),
    *in_file(
        "cuda/launch_forward.cu",
        ("inference has no bias", "  result.bias = call.bias;\n", ""),
    ),
    *in_file(
        "cuda/launch.h",
        (
            "the second kernel is not launched",
            "error != cudaSuccess || arguments.apply",
            "error == cudaSuccess || arguments.apply",
        ),
        ("clusters are of one block", "static_cast<unsigned>(plan.team);", "1;"),
    ),
    *in_file(
        "cuda/occupancy.cu",
        (
            "more than 48 KiB are not asked for",
            "static_cast<int>(most)",
            "48 << 10",
        ),
        ("clusters for code that has none", " && attributes.ptxVersion >= kFirstWithClusters", ""),
        (
            "more blocks than fit",
            "std::clamp(blocks, 1, assumed.blocks)",
            "assumed.blocks",
        ),
        (
            "a refused launch is not planned again",
            "  if (error != cudaErrorCooperativeLaunchTooLarge) return false;\n",
            "  if (error != cudaErrorInvalidDevice) return false;\n",
        ),
        (
            "a refusal is forgotten",
            "refused.store(true,",
            "refused.store(false,",
        ),
        ("the driver is asked at each call", "is_known.store(true,", "is_known.store(false,"),
    ),
    *in_file(
        "cuda/occupancy.h",
        ("two kernels are one", "return 2 * result + smooth;", "return 0;"),
    ),
]

MISTAKES = [*BARRIERS, *SUMS, *WALKS, *FORMULAS]
