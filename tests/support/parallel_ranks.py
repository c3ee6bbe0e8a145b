"""What each rank of a tensor-parallel model does for tests/backends/test_tensor_parallel.py.

`python parallel_ranks.py FOLDER DEVICE CASE...`, with the environment that torchrun gives. Checkpoints are in FOLDER; what a case
saw is left in FOLDER/CASE.RANK.pt. An error that no case expected ends the process, so that the other rank does not wait for it.
"""

import inspect
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from mean_profiles import drawn_profile
from oracle import captured_inputs
from tiny_models import tokens
from torch import nn

import fastheads

# Of each case that gives results: the checkpoint, the aggregation, options of HookManager, and what is special about it.
RESULTS = {
    "llama-last": ("llama", "last", {}, ""),
    "llama-all": ("llama", "all", {}, ""),
    "llama-token": ("llama", "token", {}, ""),
    "llama-loop": ("llama", "all", {"backend": "loop"}, ""),
    "llama-einsum": ("llama", "token", {"backend": "einsum"}, ""),
    "llama-skip": ("llama", "all", {"skip_first": 2}, ""),
    "llama-layers": ("llama", "last", {"layers": [0, 2]}, ""),
    "llama-at-once": ("llama", "all", {"group_bytes": 0}, ""),
    "llama-float64": ("llama", "all", {}, "float64"),
    "llama-grad": ("llama", "all", {}, "grad"),
    "llama-compiled": ("llama", "all", {}, "compiled"),
    "llama-mixed": ("llama", "token", {}, "mixed"),
    "llama-bias": ("llama-bias", "all", {}, ""),
    "qwen2": ("qwen2", "all", {}, ""),
    "olmo2": ("olmo2", "all", {}, ""),
    "olmo2-last": ("olmo2", "last", {}, ""),
    "olmo2-float64": ("olmo2", "token", {}, "float64"),
    "olmo2-one-kv-head": ("olmo2-one-kv-head", "all", {}, ""),
    "olmo2-grad": ("olmo2", "all", {}, "grad"),
    "olmo2-compiled": ("olmo2", "all", {}, "compiled"),
    "gemma2": ("gemma2", "last", {}, ""),
    "gemma2-at-once": ("gemma2", "token", {"group_bytes": 0, "skip_first": 1}, ""),
    "phi3": ("phi3", "token", {}, ""),
    "gpt-oss": ("gpt-oss", "all", {}, ""),
}

ABLATED = [(0, 1), (1, 3), (2, 0)]
# Padding on either side, and a row without a valid token.
MASKS = [
    [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]],
    [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]],
]


def batches(device):
    for seed, mask in enumerate(MASKS):
        ids = tokens(3, 6, seed=seed).to(device)
        yield {"input_ids": ids, "attention_mask": torch.tensor(mask, device=device)}


def measured(model, token_agg, options, special, device):
    """Results of two forwards, the inputs of the projections and their weights `[row][forward]`, `[row]`."""
    modules = [site.module for site in fastheads.find_sites(model)]
    compiled = special == "compiled"
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with (
        torch.set_grad_enabled(special == "grad"),
        captured_inputs([] if compiled else modules) as inputs,
        fastheads.HookManager(model, token_agg, vectors=True, **options) as hooks,
    ):
        for batch in batches(device):
            call(**batch)
        results = hooks.get_results()
        vectors = {name: torch.from_numpy(a) for name, a in hooks.to_profile().vectors.arrays().items()}
    weights = [getattr(m.weight, "_local_tensor", m.weight).detach().clone() for m in modules]
    return {"results": results, "vectors": vectors, "inputs": inputs, "weights": weights}


class Rank:
    """One rank, and its cases."""

    def __init__(self, folder, device):
        self.folder = folder
        self.rank = int(os.environ["RANK"])
        self.device = torch.device("cpu") if device == "cpu" else torch.device("cuda", self.rank)
        self.llama = None

    def load(self, checkpoint, parallel=True, dtype=torch.float32):
        how = {"tp_plan": "auto"} if parallel else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder / checkpoint, dtype=dtype, **how
        )
        return model.to(self.device).eval()

    def run(self, case):
        if case in RESULTS:
            checkpoint, token_agg, options, special = RESULTS[case]
            dtype = torch.float64 if special == "float64" else torch.float32
            model = self.load(checkpoint, dtype=dtype)
            if (
                special == "mixed"
            ):  # two layers that every rank runs as a whole, one with the heads of one rank
                for layer, other in ((1, checkpoint), (2, "llama-two-heads")):
                    whole = self.load(other, parallel=False)
                    model.model.layers[layer].self_attn = whole.model.layers[layer].self_attn
            return measured(model, token_agg, options, special, self.device)
        return getattr(self, case.replace("-", "_"))()

    def forward(self, model):
        with torch.no_grad():
            model(**next(batches(self.device)))

    def refusal(self, checkpoint, **options):
        """What HookManager says, and how many hooks it leaves."""
        model = self.load(checkpoint) if isinstance(checkpoint, str) else checkpoint
        try:
            fastheads.HookManager(model, **options)
        except Exception as error:
            hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
            return {"says": f"{type(error).__name__}: {error}", "hooks": hooks}
        return {"says": "nothing", "hooks": None}

    # ---------------------------------------------------------------- what is refused

    def triton(self):
        return self.refusal("llama", backend="triton")

    def verify(self):
        return self.refusal("llama", verify=True)

    def other_options(self):
        return self.refusal("llama", token_agg="all" if self.rank else "last")

    def other_layers(self):
        return self.refusal("llama", layers=[0] if self.rank else [0, 1])

    def cut_heads(self):
        return self.refusal("olmo2-three-heads")

    def torch_style(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

        model = self.load("llama", parallel=False)
        plan = {f"model.layers.{n}.self_attn.o_proj": RowwiseParallel() for n in range(3)}
        parallelize_module(model, init_device_mesh(self.device.type, (2,)), plan)
        return self.refusal(model)

    def fsdp_by_columns(self):
        """The layout of a tensor-parallel weight, and yet none."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        model = self.load("llama", parallel=False)
        mesh = init_device_mesh(self.device.type, (2,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else Shard(0))
        return self.refusal(model)

    def fsdp_and_tensor_parallel(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        model = self.load("llama", parallel=False)
        mesh = init_device_mesh(self.device.type, (1, 2), mesh_dim_names=("fsdp", "tp"))
        layers = range(3)
        names = [f"model.layers.{n}.self_attn.o_proj" for n in layers]
        plan = {f"{name}.weight": "rowwise" for name in names} | dict.fromkeys(names, "rowwise")
        if len(inspect.signature(apply_tensor_parallelism).parameters) == 2:  # transformers 5.17
            model.tp_plan = plan
            apply_tensor_parallelism(model, mesh["tp"])
        else:
            apply_tensor_parallelism(model, mesh["tp"], plan)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["fsdp"])
        return self.refusal(model)

    def adapters(self):
        import peft

        return self.refusal(
            peft.get_peft_model(self.load("llama"), peft.LoraConfig(target_modules=["o_proj"]))
        )

    # ---------------------------------------------------------------- ablation

    def ablation(self):
        """Logits with heads of both ranks zeroed, norms that are measured meanwhile, and what is said of means."""
        found = {}
        for name in ("llama", "olmo2", "gpt-oss"):  # input split, whole, and all of it on every rank
            model = self.load(name)
            with (
                fastheads.ablate(model, ABLATED),
                fastheads.HookManager(model, "token") as hooks,
                torch.no_grad(),
            ):
                found[name] = model(**next(batches(self.device))).logits.cpu()
                found[f"{name} norms"] = hooks.get_results()["head_output_norm"]["max"]
            with torch.no_grad():
                found[f"{name} intact"] = model(**next(batches(self.device))).logits.cpu()
        try:
            fastheads.ablate(self.load("llama"), ABLATED, "mean", means=self.drawn())
            found["says"] = "nothing"
        except fastheads.FastheadsError as error:
            found["says"] = f"{type(error).__name__}: {error}"
        return found

    def drawn(self):
        return drawn_profile(self.load("llama", parallel=False))

    # ---------------------------------------------------------------- what goes wrong

    def kv_heads_not_divisible(self):
        """One KV head, which transformers splits over two ranks: the model's own forward fails."""
        model = self.load("llama-one-kv-head")
        with fastheads.HookManager(model) as hooks:
            try:
                self.forward(model)
                says = "nothing"
            except RuntimeError as error:
                says = str(error)
            return {"says": says, "count": hooks.to_profile().moments["head_output_norm"].count}

    def error_on_both(self):
        """An error in the middle of one forward, on both ranks: it counts nothing."""
        model = self.load("llama")
        with fastheads.HookManager(model, "all", group_bytes=0) as hooks, torch.no_grad():
            for number, batch in enumerate([*batches(self.device), *batches(self.device)]):
                if number != 1:
                    continue
                handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
                try:
                    model(**batch)
                    raise AssertionError("it was to fail")
                except ZeroDivisionError:
                    handle.remove()
            for batch in batches(self.device):
                model(**batch)
            return {"results": hooks.get_results()}

    def error_on_one(self):
        """An error after the last collective of the model, on one rank: it counts on the other only."""
        model = self.load("llama")
        with fastheads.HookManager(model, "all") as hooks:
            self.forward(model)
            if self.rank == 1:
                handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
            try:
                self.forward(model)
                failed = False
            except ZeroDivisionError:
                failed = True
                handle.remove()
            try:
                hooks.get_results()
                says = "nothing"
            except RuntimeError as error:
                says = str(error)
            hooks.reset()
            with torch.no_grad():
                for batch in batches(self.device):
                    model(**batch)
            return {"failed": failed, "says": says, "results": hooks.get_results()}

    def errors_in_turn(self):
        """One forward counts on rank 1 only, another with as many samples on rank 0 only."""
        model = self.load("llama")
        with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
            for failing in range(2):
                if failing == self.rank:
                    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
                try:
                    model(tokens(3, 6, seed=failing).to(self.device))
                except ZeroDivisionError:
                    handle.remove()
            try:
                hooks.get_results()
            except RuntimeError as error:
                return {"says": str(error)}
        return {"says": "nothing"}

    def stale_on_one(self):
        """One rank's weight changes behind autograd's back."""
        model = self.load("llama")
        with fastheads.HookManager(model) as hooks:
            self.forward(model)
            if self.rank == 1:
                model.model.layers[1].self_attn.o_proj.weight._local_tensor.data.mul_(2)
            try:
                hooks.get_results()
                says = "nothing"
            except RuntimeError as error:
                says = f"{type(error).__name__}: {error}"
        return {"says": says}

    # ---------------------------------------------------------------- what else must hold

    def one_sum(self):
        """How many sums over ranks there are: ours are the only ones in float64."""
        own, sums = dist.all_reduce, []

        def counting(tensor, *args, **kwargs):
            if tensor.dtype == torch.float64:
                sums.append(tensor.numel())
            return own(tensor, *args, **kwargs)

        model = self.load("llama")
        dist.all_reduce = counting
        seen = {}
        try:
            with fastheads.HookManager(model, "token", group_bytes=0) as hooks, torch.no_grad():
                seen["attached"] = len(sums)
                for batch in batches(self.device):
                    model(**batch)
                seen["run"] = len(sums)
                hooks.get_results()
                seen["asked"] = len(sums)
                with hooks.paused():
                    self.forward(model)
                seen["paused"] = len(sums)
        finally:
            dist.all_reduce = own
        return {"seen": seen, "sizes": sums}

    def changed_weight(self):
        """Another weight in the second forward: in place, and as another parameter in the third."""
        model = self.load("llama")
        modules = [site.module for site in fastheads.find_sites(model)]
        weights = []
        with (
            torch.no_grad(),
            captured_inputs(modules) as inputs,
            fastheads.HookManager(model, "token") as hooks,
        ):
            for step in range(3):
                if step == 1:
                    modules[1].weight.mul_(2)
                if step == 2:
                    modules[1].weight = nn.Parameter(modules[1].weight * 3)
                self.forward(model)
                weights.append(modules[1].weight._local_tensor.clone())
            return {"results": hooks.get_results(), "inputs": inputs, "weights": weights}

    def whole_job(self):
        """`profile()` on every rank; the file of one of them."""
        model = self.load("llama")
        found = fastheads.profile(model, batches(self.device))
        if self.rank == 0:
            found.save(self.folder / "whole-job.safetensors")
        return {"sequences": found.metadata["data"]["sequences"]}


def main():
    """Run the cases that the command line names."""
    folder, device, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rank = Rank(Path(folder), device)
    how = {"device_id": rank.device} if rank.device.type == "cuda" else {}
    if how:
        torch.cuda.set_device(rank.device)
    dist.init_process_group("nccl" if how else "gloo", timeout=timedelta(seconds=60), **how)
    for case in cases:
        try:
            seen = rank.run(case)
        except BaseException:
            traceback.print_exc()
            print(f"in case {case}", file=sys.stderr, flush=True)
            os._exit(1)
        torch.save(seen, Path(folder) / f"{case}.{rank.rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
