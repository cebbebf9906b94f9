"""What __init__.py imports on first use, said to type checkers."""

from gptoss_jax.chat import Chat as Chat
from gptoss_jax.chat import TurnSettings as TurnSettings
from gptoss_jax.checkpoint import load as load
from gptoss_jax.engine.engine import Engine as Engine
from gptoss_jax.engine.generate import generate as generate
from gptoss_jax.engine.request import Request as Request
from gptoss_jax.engine.request import SamplingParams as SamplingParams
from gptoss_jax.engine.settings import EngineSettings as EngineSettings
from gptoss_jax.harmony.tokenizer import load_tokenizer as load_tokenizer
from gptoss_jax.model.config import ModelConfig as ModelConfig
from gptoss_jax.model.transformer import GptOss as GptOss
from gptoss_jax.moderation import moderate as moderate
from gptoss_jax.sharding import make_mesh as make_mesh
from gptoss_jax.tools.functions import tool as tool

__version__: str
