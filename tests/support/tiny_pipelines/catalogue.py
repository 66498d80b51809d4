"""Every tiny pipeline by its name."""

from collections.abc import Callable

from .audio import audioldm2, dance, stable_audio, stable_audio_cosine
from .harness import Tiny
from .images import ddim, ddpm, dit, flux, kandinsky, pixart_sigma, sana, sd, sd3, sdxl
from .videos import ltx, ltx_i2v, mochi, wan, wan22, wan_i2v, wan_ti2v, wan_unipc, wan_v2v

BASIC = (sd, sdxl, dit, ddpm, sd3, flux)
IMAGES = (ddim, pixart_sigma, sana, kandinsky)
VIDEOS = (wan, wan_unipc, wan22, wan_v2v, wan_i2v, wan_ti2v, ltx, ltx_i2v, mochi)
AUDIO = (stable_audio, stable_audio_cosine, audioldm2, dance)
MAKERS: dict[str, Callable[[], Tiny]] = {maker.__name__: maker for maker in (*BASIC, *IMAGES, *VIDEOS, *AUDIO)}
