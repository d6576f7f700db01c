"""C2C as a model of lm-evaluation-harness: importing this package registers it as `c2c`.

The harness finds its models by import only (it looks for no entry points), so its command line is started from here;
all of its options work:

    python -m cache2cache.evaluate.lm_eval --model c2c \\
        --model_args receiver=smollm2-135m,sharer=qwen2.5-coder-1.5b,fuser=demo \\
        --tasks arc_easy --apply_chat_template --device cpu --batch_size 8

`model_args` are those of `C2CLM.from_pretrained`; of several sharers the names are separated by `;`. In Python, give
`lm_eval.simple_evaluate` a `C2CLM(pair)`.

With `--apply_chat_template` a request carries the conversation itself, as JSON, and every model of the pair reads it
through the template that the fuser was trained with; a `gen_prefix` is put into the receiver's mouth, behind the fused
prompt. Without, every model reads the plain text, which few fusers were trained for.

With closed gates, or without a sharer, all numbers are those of the harness's own model `hf` (where the fuser leaves
the receiver its own chat template): tokens and their split into context and continuation follow its rules. Four things
differ on purpose:

- Nothing is cut: what is longer than the receiver's context raises ContextLengthError.
- A conversation that a template refuses raises TemplateError; `hf` takes its system message out.
- Log-likelihoods are computed in float32, whatever the weights are (`softmax_dtype=float32` of `hf`).
- A row of a batch stops where it stops alone; in `hf` it writes on behind a stop string that is a special token.
"""

from cache2cache.errors import MissingExtraError

try:
    import lm_eval as _  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "evaluating with lm-evaluation-harness needs lm_eval", hint="pip install 'cache2cache[lm-eval]'"
    ) from error

from cache2cache.evaluate.lm_eval.model import C2CLM

__all__ = ["C2CLM"]
