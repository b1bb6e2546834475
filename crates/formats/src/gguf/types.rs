use bevel_base::DType;

/// Element types with the ids that ggml gives them, `enum ggml_type`.
const IDS: [(u32, DType); 28] = [
    (0, DType::F32),
    (1, DType::F16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (6, DType::Q5_0),
    (7, DType::Q5_1),
    (8, DType::Q8_0),
    (10, DType::Q2_K),
    (11, DType::Q3_K),
    (12, DType::Q4_K),
    (13, DType::Q5_K),
    (14, DType::Q6_K),
    (16, DType::IQ2_XXS),
    (17, DType::IQ2_XS),
    (18, DType::IQ3_XXS),
    (20, DType::IQ4_NL),
    (21, DType::IQ3_S),
    (22, DType::IQ2_S),
    (23, DType::IQ4_XS),
    (24, DType::I8),
    (25, DType::I16),
    (26, DType::I32),
    (27, DType::I64),
    (28, DType::F64),
    (30, DType::BF16),
    (34, DType::TQ1_0),
    (35, DType::TQ2_0),
    (39, DType::MXFP4),
];

/// Types of ggml that bevel does not read, so that messages can name them.
const FOREIGN: [(u32, &str); 15] = [
    (4, "Q4_2, removed from ggml"),
    (5, "Q4_3, removed from ggml"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (19, "IQ1_S"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4, removed from ggml"),
    (32, "Q4_0_4_8, removed from ggml"),
    (33, "Q4_0_8_8, removed from ggml"),
    (36, "I2_S of BitNet's fork, or IQ4_NL_4_4, removed from ggml"),
    (37, "IQ4_NL_4_8, removed from ggml"),
    (38, "IQ4_NL_8_8, removed from ggml"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
];

/// The id that GGUF files carry for a type. `None` for types that ggml does not have, such as
/// FP8 and unsigned integers.
pub fn ggml_type_id(dtype: DType) -> Option<u32> {
    IDS.iter().find(|row| row.1 == dtype).map(|row| row.0)
}

/// Undoes [`ggml_type_id`]. `None` for ids that are unknown or not supported.
pub fn ggml_type_of(id: u32) -> Option<DType> {
    IDS.iter().find(|row| row.0 == id).map(|row| row.1)
}

/// What to tell users about an id without a [`DType`].
pub(super) fn describe_unsupported(id: u32) -> String {
    match FOREIGN.iter().find(|row| row.0 == id) {
        Some((_, name)) => format!("its type {name} (id {id}) is not supported"),
        None => format!("its type id {id} is unknown: the file is damaged or newer than bevel"),
    }
}
