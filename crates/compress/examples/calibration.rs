//! Shows the calibration tokens that a source gives for a model.
//!
//! ```sh
//! cargo run --release -p bevel-compress --example calibration -- MODEL [SOURCE [SAMPLES [TOKENS]]]
//! ```

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use bevel_compress::{CalibrationConfig, Source};
use bevel_formats::hub::{self, HubConfig};
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().ok_or("which model?")?;
    let source: Source = arguments.next().as_deref().unwrap_or("self").parse()?;
    let mut number = |default| arguments.next().map_or(Ok(default), |text| text.parse());
    let (samples, tokens) = (number(4)?, number(128)?);
    let config = CalibrationConfig { source, samples, tokens, ..CalibrationConfig::default() };

    let checkpoint = Checkpoint::open(Path::new(&model))?;
    let cpu = Cpu::new(0)?;
    let start = Instant::now();
    let mut fetch =
        |repo: &_| hub::fetch_data_set(&HubConfig::from_env(), repo, hub::ENOUGH, &mut ());
    let mut on_tokens = |_: usize, _: usize| ControlFlow::Continue(());
    let found = config.load(&checkpoint, &cpu, &mut fetch, &mut on_tokens)?;
    let seconds = start.elapsed().as_secs_f64();

    let tokenizer = checkpoint.tokenizer()?;
    for (i, sequence) in found.sequences.iter().take(4).enumerate() {
        println!("--- sequence {i}\n{}", tokenizer.decode(sequence, false));
    }
    found.warnings.iter().for_each(|warning| println!("warning: {warning}"));
    let rate = found.tokens() as f64 / seconds;
    println!("{}: {seconds:.2} s, {rate:.0} tokens/s", found.description);
    Ok(())
}
