//! `flotilla generate`: man pages and completions from the command line's own description, for the package's build.

use crate::args::{Cli, GenerateArgs, Generated};
use crate::failure::{Exit, Failure};

/// Writes the files.
pub(crate) fn generate(args: &GenerateArgs) -> Result<(), Failure> {
    let mut command = Cli::description();
    let written = match args.what {
        Generated::Man => clap_mangen::generate_to(command, &args.folder),
        Generated::Completions => {
            use clap_complete::Shell;
            [Shell::Bash, Shell::Zsh, Shell::Fish].into_iter().try_for_each(|shell| {
                clap_complete::generate_to(shell, &mut command, "flotilla", &args.folder).map(|_| ())
            })
        }
    };
    written.map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", args.folder.display())))
}
