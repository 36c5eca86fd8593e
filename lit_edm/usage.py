"""What `lit-edm --help` says, known without what takes seconds to import."""

HELP = """\
usage: lit-edm [-h] [-c CONFIG] [--print_config[=flags]] {fit,validate,test,predict} ...

Fine-tunes SDXL and Playground v2.5, or trains a denoiser from nothing, by the design space of Karras et al. (2022).

subcommands:
  fit                   Trains as a config says: lit-edm fit --config configs/quickstart.yaml
  validate              Runs the validation of a config once, of --ckpt_path.
  test                  Runs the test of a model that has a test_step; those of this package have none.
  predict               Renders prompts: lit-edm predict --config configs/generate.yaml

options:
  -h, --help            Shows this and ends; after a subcommand its own options, some hundred.
  -c, --config CONFIG   A YAML file with the settings of subcommands, each under its name.
  --print_config[=flags]
                        Prints the whole config and ends; flags, separated by commas: skip_default, skip_unset.

lit-edm fit --model.help SDXLModule explains the settings of a class, as --data.help and --trainer.callbacks.help do.
"""
