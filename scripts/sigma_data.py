"""Measures the latents of a config's images: `python scripts/sigma_data.py --config configs/edm_digits.yaml`.

Prints lines for the config: sigma_data, the RMS of what the module's encode returns, and the p_mean that goes with it.
"""

from lightning.pytorch.cli import ArgsType

from lit_edm.cli import CLI
from lit_edm.modules.statistics import latent_statistics


def main(args: ArgsType = None) -> None:
    """Builds module and images as `lit-edm fit` does, but trains nothing."""
    cli = CLI(run=False, save_config_callback=None, args=args)
    cli.datamodule.setup("fit")
    cli.model.configure_model()
    print(latent_statistics(cli.model.to(cli.trainer.strategy.root_device), cli.datamodule.train_dataloader()))


if __name__ == "__main__":
    main()
