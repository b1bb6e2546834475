//! Loads a model and continues a text: `cargo run --example generate -- MODEL.gguf "Once upon a time"`.
//! Without arguments it runs the small model in `assets/`.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

use bevel::kernels::{Cpu, KvType};
use bevel::model::{Checkpoint, GenerateOptions, Model, Session, generate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let built_in = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-austen");
    let path = arguments.next().unwrap_or_else(|| built_in.to_owned());
    let prompt = arguments.next().unwrap_or_else(|| "The young lady was".to_owned());

    let cpu = Cpu::new(0)?; // a thread for each processor
    let checkpoint = Checkpoint::open(Path::new(&path))?;
    let tokenizer = checkpoint.tokenizer()?;
    let model = Model::load(checkpoint, &cpu, &mut |_| {})?;
    let mut session = Session::new(&model, &cpu, 512, KvType::F16)?;

    let tokens = tokenizer.encode(&prompt, true, false)?;
    let options = GenerateOptions { max_tokens: Some(40), ..GenerateOptions::default() };
    print!("{prompt}");
    let answer = generate(&mut session, &tokenizer, &tokens, &options, &mut |text| {
        print!("{text}");
        match std::io::stdout().flush() {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    println!();
    assert!(!answer.tokens.is_empty());
    Ok(())
}
