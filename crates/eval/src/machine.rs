//! What the measurements ran on.

use bevel_kernels::Cpu;
use serde::Serialize;

/// The machine, as far as it tells.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Threads used.
    pub threads: usize,
    /// Instruction set used.
    pub isa: String,
    /// Bytes of memory; `None` where the system does not say.
    pub memory: Option<u64>,
    /// Operating system and architecture.
    pub system: String,
}

impl Machine {
    /// The machine this program runs on.
    pub fn new(cpu: &Cpu) -> Self {
        let name = field("/proc/cpuinfo", "model name").or_else(|| field("/proc/cpuinfo", "Model"));
        Self {
            cpu: name.unwrap_or_else(|| "unknown processor".to_owned()),
            threads: cpu.pool().threads(),
            isa: cpu.isa().to_string(),
            memory: kilobytes("/proc/meminfo", "MemTotal"),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }
}

/// The most memory this process has held at once, in bytes, file mappings counted; `None` where the
/// system does not say.
pub fn peak_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM")
}

fn kilobytes(file: &str, name: &str) -> Option<u64> {
    let value = field(file, name)?;
    value.strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The value of the first line `name: value`.
fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}
