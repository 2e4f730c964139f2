//! `cargo bench --bench kernels [-- WORDS…]`: what `resa-engine bench-kernels --filter WORDS`
//! measures, through the same code.

use resa_engine::Result;
use resa_engine::bench::{self, Options};
use resa_engine::report::Progress;

fn main() -> Result<()> {
    // Cargo adds `--bench`.
    let words = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"));
    let options = Options {
        filter: words.collect(),
        ..Options::default()
    };
    print!("{}", bench::run(&options, &mut Progress::stderr(1))?);
    Ok(())
}
