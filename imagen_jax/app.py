"""A page in the browser: a prompt in, pictures out, stage by stage.

python -m imagen_jax.app --stage=BASE_WORKDIR --stage=SR_WORKDIR [--output=DIR \
    --host=127.0.0.1 --port=7860 --max_prompt_chars=500 --max_waiting=20]

Whoever opens the page may ask; one picture is made at a time, in the order of asking.
See docs/app.md.
"""

import html
import importlib.util
import os
import re
import signal
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from imagen_jax import cli
from imagen_jax.api.desk import Desk, Shown
from imagen_jax.api.library import load_cascade
from imagen_jax.api.samples import check_output
from imagen_jax.config import StageConfig
from imagen_jax.errors import UserError

# Each other number of steps is a program that is compiled and kept.
_STEPS = (8, 16, 32, 64, 128, 256)
_SAMPLERS, _THRESHOLDS = ("ddpm", "ddim", "dpmpp"), ("none", "static", "dynamic")
# What the page asks for; an address in place of a file would be fetched.
_ROUTES = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|(assets|static)/.*"
    r"|gradio_api/(info|startup-events|queue/(join|data)|upload(_progress)?|run/\w+"
    r"|heartbeat/\w+|cancel|reset|file=(?!http).*))",
    re.IGNORECASE | re.DOTALL,
)
# Bytes of a picture that is given, and of anything else that the page sends.
_UPLOAD, _BODY = 20 * 2**20, 2**18
# Seconds: how often files are looked for that are served no more, and after how long.
_CACHE = (3600, 86_400)
# The latest visits, whose histories are known. Each takes 0.1 MiB.
_SESSIONS = 200
# The page loads nothing from elsewhere.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
# Pictures fill their frames, small ones pixel by pixel, below their names.
_CSS = """
.drawn .image-container, .drawn label {position: static !important}
.drawn .image-container > button, .drawn .image-frame, .drawn img {width: 100%}
.drawn img {object-fit: contain}
.small img {image-rendering: pixelated}
.grid-wrap {overflow-y: auto !important}
"""


def refusal(scope: dict[str, Any]) -> int:
    """The HTTP status for a request that the page does not make; 0 for others.

    gradio has many more routes, and reads bodies of any length.
    """
    if not _ROUTES.fullmatch(scope["path"]):
        return 404
    if scope["method"] != "POST":
        return 0
    length = dict(scope["headers"]).get(b"content-length", b"")
    if not length.isdigit():
        return 411
    return 413 * (int(length) > (_UPLOAD if "/upload" in scope["path"] else _BODY))


class Guard:
    """ASGI middleware: refuses what `refusal` says, and adds the page's policy."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope, receive, send):
        """Passes a request on, or answers it without a body."""

        async def answer(message):
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY)
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        if scope["type"] == "http" and (status := refusal(scope)):
            headers = [(b"content-length", b"0")]
            start = {"type": "http.response.start", "status": status}
            await answer(start | {"headers": headers})
            await answer({"type": "http.response.body"})
        else:
            await self.app(scope, receive, answer)


def answering(request: Callable[..., Iterator[Shown]], show: Callable) -> Callable:
    """A request for gradio: `show` makes values of what it shows.

    Whatever goes wrong is a message to its user, and no traceback.
    """

    def answer(*values):
        import gradio as gr

        message = ""
        try:
            for shown in request(*values):
                yield show(shown)
        except UserError as error:
            # A message is HTML, and may quote what a stranger wrote.
            message = html.escape(str(error))
        except Exception:
            traceback.print_exc()
            message = "this one failed; whoever runs the app sees why in its terminal"
        # Not above: gradio keeps it for a while, and with it what it came from.
        if message:
            raise gr.Error(message, print_exception=False)

    return answer


def fields(cfg: StageConfig) -> list[Any]:
    """The fields of a stage, in the order of `desk.SETTINGS`; some may be hidden."""
    import gradio as gr

    own = cfg.sampler
    steps, samplers = sorted({own.steps, *_STEPS}), sorted({own.name, *_SAMPLERS})
    is_noised = bool(cfg.lowres_size and cfg.diffusion.lowres_augmentation)
    small = {"min_width": 110}
    gr.Markdown(f"**{cfg.image_size} x {cfg.image_size} pixels**")
    with gr.Row():
        return [
            gr.Number(
                None if own.guidance_schedule else own.guidance,
                label="Guidance",
                placeholder="a schedule",
                step=0.5,
                **small,
            ),
            gr.Dropdown(steps, value=own.steps, label="Steps", **small),
            gr.Dropdown(samplers, value=own.name, label="Sampler", **small),
            gr.Dropdown(_THRESHOLDS, value=own.threshold, label="Threshold", **small),
            gr.Number(
                own.aug_level if is_noised else None,
                label="Augmentation",
                step=0.1,
                visible=is_noised,
                **small,
            ),
        ]


def asking(desk: Desk) -> types.SimpleNamespace:
    """What users fill in and press, by names; `values` are those of `settings`."""
    import gradio as gr

    ask, configs = types.SimpleNamespace(), desk.cascade.config
    makes, enlarges = not configs[0].lowres_size, bool(configs[-1].lowres_size)
    ask.prompt = gr.Textbox(
        label="Prompt", lines=2, max_length=desk.most_chars, autofocus=True
    )
    with gr.Row():
        ask.seed = gr.Number(0, label="Seed", precision=0, min_width=120)
        ask.is_new = gr.Checkbox(True, label="new each time", min_width=120)
    ask.generate = gr.Button("Make a picture", variant="primary", visible=makes)
    with gr.Accordion("Settings of each stage", open=False):
        ask.values = [field for cfg in configs for field in fields(cfg)]
    with gr.Accordion("Compare guidance", open=False, visible=makes):
        ask.weights = gr.Textbox("1, 2, 4, 8", label="Weights of the first stage")
        ask.compare = gr.Button("Make a sheet")
    with gr.Accordion("Enlarge a picture", open=not makes, visible=enlarges):
        ask.file = gr.File(label="A picture", height=120)
        # Its own reads the file, or makes an empty one beside it.
        ask.file.preprocess = lambda given: given and given.path
        ask.enlarge = gr.Button("Enlarge it, as the prompt says")
    return ask


def showing(desk: Desk) -> types.SimpleNamespace:
    """What users see of their requests, by names."""
    import gradio as gr

    see, configs = types.SimpleNamespace(), desk.cascade.config
    drawn = {"format": "png", "interactive": False, "buttons": ["download"]}
    see.status = gr.Markdown("nothing is made yet", min_height=80)
    with gr.Row():
        see.stages = [
            gr.Image(
                label=f"{cfg.image_size} x {cfg.image_size}",
                scale=2 if cfg is configs[-1] else 1,
                min_width=100,
                elem_classes=["drawn", "small"],
                **drawn,
            )
            for cfg in configs
        ]
    see.sheet = gr.Image(
        label="Guidance", visible=False, elem_classes=["drawn"], **drawn
    )
    see.gallery = gr.Gallery(
        label="History",
        columns=6,
        fit_columns=False,
        height=150,
        allow_preview=False,
        interactive=False,
        buttons=[],
    )
    with gr.Row():
        see.picked = gr.Textbox(label="Picked in the history", interactive=False)
        see.use = gr.Button("Use this seed", min_width=120, scale=0)
    return see


async def _no_address(url: str) -> None:
    """Takes the place of what gradio fetches an address with that a request names."""
    import gradio as gr

    raise gr.Error("give a file, not its address", print_exception=False)


def page(desk: Desk, most_waiting: int = 20) -> Any:
    """The page of a desk, a `gradio.Blocks` that is not yet served.

    Of requests beyond `most_waiting` gradio tells their users that it is busy.
    """
    # All that gradio writes, and all that it serves beside its own code.
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        os.environ[name] = str(desk.served.resolve())
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)
    import gradio as gr

    gr.processing_utils.async_ssrf_protected_get = _no_address

    def show(shown: Shown) -> list[Any]:
        sheet, kept = gr.skip(), [gr.skip(), gr.skip()]
        if shown.sheet is not None:
            sheet = gr.Image(shown.sheet, visible=True)
        if shown.history is not None:
            kept = [shown.history, [one.path for one in shown.history]]
        return [*shown.pictures, sheet, shown.status, shown.seed, *kept]

    def pick(history, event: gr.SelectData):
        # Of visits long ago nothing is known any more.
        for one in history[event.index : event.index + 1]:
            return one.seed, f"seed {one.seed}: {one.prompt}"
        return None, ""

    with gr.Blocks(
        title="imagen-jax", analytics_enabled=False, delete_cache=_CACHE
    ) as blocks:
        history, chosen = gr.State([]), gr.State()
        gr.Markdown("# imagen-jax")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                ask = asking(desk)
            with gr.Column(scale=3, min_width=320):
                see = showing(desk)
        asked = [ask.prompt, ask.seed, ask.is_new, history, *ask.values]
        seen = [*see.stages, see.sheet, see.status, ask.seed, history, see.gallery]
        for name, inputs, events in (
            ("generate", [], [ask.generate.click, ask.prompt.submit]),
            ("compare", [ask.weights], [ask.compare.click]),
            ("enlarge", [ask.file], [ask.enlarge.click]),
        ):
            gr.on(
                events,
                answering(getattr(desk, name), show),
                [*inputs, *asked],
                seen,
                api_name=name,
                # One request at a time, of whatever kind.
                concurrency_id="cascade",
                concurrency_limit=1,
                show_progress_on=[see.status],
            )
        now = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        see.gallery.select(pick, history, [chosen, see.picked], **now)
        see.use.click(
            lambda seed: (seed or 0, seed is None),
            chosen,
            [ask.seed, ask.is_new],
            **now,
        )
    # Not even a script gets past the queue.
    return blocks.queue(max_size=most_waiting, api_open=False)


def launch(blocks: Any, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Serves a page until its `close`; returns its address.

    Raises `UserError` for a port that is taken.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    system = ["system-ui", "sans-serif"]
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            inline=False,
            share=False,
            show_error=False,
            max_file_size=_UPLOAD,
            state_session_capacity=_SESSIONS,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Guard)]},
            theme=gr.themes.Default(font=system, font_mono=["monospace"]),
            css=_CSS,
        )
    except OSError:
        raise UserError(
            f"--host={host} --port={port}: this port is taken, or the address is none "
            "of this machine's"
        ) from None
    return address


def define_flags() -> None:
    """Defines this door's flags; main() reads them."""
    flags.DEFINE_multi_string("stage", None, "workdir of a stage; in order, base first")
    flags.DEFINE_string("encoder_weights", "", "file or folder of the text encoder")
    flags.DEFINE_string("output", "runs/app", "folder for the pictures")
    flags.DEFINE_string("host", "127.0.0.1", "address to serve at; 0.0.0.0 is any")
    flags.DEFINE_integer("port", 7860, "to serve at", 1, 65_535)
    flags.DEFINE_integer("max_prompt_chars", 500, "longer prompts are refused", 1)
    flags.DEFINE_integer("max_waiting", 20, "requests that wait; more are refused", 1)
    flags.mark_flag_as_required("stage")


def main() -> None:
    """Serves the page until Ctrl-C."""
    args = flags.FLAGS
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the app needs gradio: pip install 'imagen-jax[app]'")
    check_output(args.output)
    cascade = load_cascade(*args.stage, encoder_weights=args.encoder_weights)
    desk = Desk(cascade, args.output, args.max_prompt_chars)
    blocks = page(desk, args.max_waiting)
    address = launch(blocks, args.host, args.port)
    print(f"the app is at {address} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    finally:
        blocks.close(verbose=False)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
