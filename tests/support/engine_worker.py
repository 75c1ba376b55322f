"""The engine process: a JSON line in names a checkpoint, an ANSWER line out completes prompts."""

import gc
import json
import sys

# On stderr, once the engine has started.
SERVING = "ENGINE IS SERVING"
PROMPTS = [[5, 6, 7, 8], [300, 12, 44, 190, 77, 3, 3, 9, 10]]
# Of an engine on a GPU: not a share of what is free, which other tests on it change meanwhile.
GPU_MEMORY = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 28}


def answer(job: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    adapter = job.pop("adapter", None)
    # A round is one batch; the answer is that of the last.
    rounds = job.pop("rounds", [PROMPTS])
    max_tokens = job.pop("max_tokens", 12)
    held = job.pop("held", None)
    options = {"enforce_eager": True, "max_model_len": 128, "distributed_executor_backend": "uni"}
    if current_platform.is_cuda():
        options |= GPU_MEMORY
    llm = LLM(**{**options, **job})
    try:
        if held:
            llm.collective_rpc(save_held, args=(held,))
        print(SERVING, file=sys.stderr, flush=True)
        for prompts in rounds:
            completions = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=5, ignore_eos=True),
                lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
                use_tqdm=False,
            )
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        # Of CUDA graphs, which have just been freed: torch refuses to capture into it once more.
        type(current_platform)._global_graph_pool = None
    outputs = [completion.outputs[0] for completion in completions]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [
                step[token].logprob
                for step, token in zip(output.logprobs, output.token_ids, strict=True)
            ]
            for output in outputs
        ],
        "likely": [[list(step) for step in output.logprobs] for output in outputs],
        "cached_tokens": [completion.num_cached_tokens or 0 for completion in completions],
    }


def save_held(worker, folder: str) -> None:
    """Write what the 2:4 layers of a rank hold to FOLDER/RANK.pt, by parameter."""
    import torch

    model = worker.model_runner.get_model()
    tensors = {
        name: parameter.cpu()
        for name, parameter in model.named_parameters()
        if "weight_packed" in name or "metadata_" in name
    }
    torch.save(tensors, f"{folder}/{worker.rank}.pt")


def main() -> None:
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        # The one boundary where any refusal of the engine is the answer.
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print("ANSWER " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
