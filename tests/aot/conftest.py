"""Tests here compile for accelerators that are not there; each asks for its compiler with pytest.importorskip."""

from gptoss_jax.aot import quiet_libtpu

quiet_libtpu()  # before anything loads libtpu, which reads these settings once
