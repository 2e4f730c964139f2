//! The command `resa-engine`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
