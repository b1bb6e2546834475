use std::sync::LazyLock;

use bevel_eval::{Ask, Choices, ChoicesConfig, Encoded, Error, Question};
use bevel_kernels::{Cpu, KvType};
use bevel_model::chat::{CHATML, ChatTemplate, SpecialTexts};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Model, Session};

use crate::tiny_austen;

static MODEL: LazyLock<(Model, Tokenizer, Cpu)> = LazyLock::new(tiny_austen);

const CONFIG: ChoicesConfig = ChoicesConfig { context: None, kv_type: KvType::F32 };

const QUESTIONS: &str = r#"
{"prompt": "It was a truth universally", "choices": ["acknowledged", "purple", "of the the of"], "answer": 0, "subject": "openings", "id": "p&p"}
{"prompt": "She was very much", "choices": ["obliged to him for his kindness", "the"], "answer": "a", "subject": "manners"}

{"question": "What is a gentleman?", "choices": ["A man of fortune.", "Ten.", "Nothing at all, my dear."], "answer": "B", "subject": "manners", "id": 17}
{"prompt": "Mr. Darcy looked at", "choices": [" Elizabeth", "\nher"], "answer": 1}
"#;

fn ask(template: Option<&ChatTemplate>) -> Choices {
    let questions = Question::parse_jsonl(QUESTIONS).unwrap();
    CONFIG.run(&MODEL.0, &MODEL.1, &MODEL.2, &questions, template, &mut |_| ()).unwrap()
}

/// ln p of the tokens of `all` after those of `before`, the sequence run anew for each of them.
fn naive(before: &[u32], all: &[u32]) -> f64 {
    let score = |t: usize| {
        let mut session = Session::new(&MODEL.0, &MODEL.2, all.len(), KvType::F32).unwrap();
        let logits = session.feed(&all[..t]).unwrap();
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        f64::from(logits[all[t] as usize]) - sum.ln()
    };
    assert!(all.starts_with(before));
    (before.len()..all.len()).map(score).sum()
}

#[test]
fn log_likelihoods_are_those_of_the_tokens() {
    let found = ask(None);
    let encode = |text: &str| MODEL.1.encode(text, false, false).unwrap();
    let check = |question: usize, prompt: &str, choices: &[&str]| {
        for (i, choice) in choices.iter().enumerate() {
            let expected = naive(&encode(prompt), &encode(&format!("{prompt}{choice}")));
            let found = found.answers[question].log_likelihoods[i];
            assert!((found - expected).abs() < 1e-3, "{prompt}{choice}: {found} {expected}");
        }
    };
    check(0, "It was a truth universally", &[" acknowledged", " purple", " of the the of"]);
    check(1, "She was very much", &[" obliged to him for his kindness", " the"]);
    let question = "Question: What is a gentleman?\nAnswer:";
    check(2, question, &[" A man of fortune.", " Ten.", " Nothing at all, my dear."]);
    check(3, "Mr. Darcy looked at", &[" Elizabeth", "\nher"]);
}

#[test]
fn choices_by_sum_by_bytes_and_by_tokens() {
    let found = ask(None);
    let questions = Question::parse_jsonl(QUESTIONS).unwrap();
    for (answer, question) in found.answers.iter().zip(&questions) {
        let best = |score: &dyn Fn(usize) -> f64| {
            (0..question.choices.len()).max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap()
        };
        let sums = &answer.log_likelihoods;
        let encoded = Encoded::new(question, &MODEL.1, None).unwrap();
        assert_eq!(answer.chosen, best(&|i| sums[i]));
        assert_eq!(answer.chosen_by_bytes, best(&|i| sums[i] / question.choices[i].len() as f64));
        assert_eq!(answer.chosen_by_tokens, best(&|i| sums[i] / encoded.scored(i) as f64));
    }
    // A short word is likelier than a long sentence, but not than each of its words.
    assert_eq!((found.answers[1].chosen, found.answers[1].chosen_by_bytes), (1, 0));
    let ids: Vec<&str> = found.answers.iter().map(|a| a.id.as_str()).collect();
    assert_eq!(ids, ["p&p", "3", "17", "6"]);
    let answers: Vec<usize> = found.answers.iter().map(|a| a.answer).collect();
    assert_eq!(answers, [0, 0, 1, 1]);
}

#[test]
fn accuracies_and_their_errors() {
    let found = ask(None);
    let right = found.answers.iter().filter(|a| a.chosen == a.answer).count() as f64;
    let acc = right / 4.0;
    assert_eq!((found.accuracy.questions, found.accuracy.acc.value), (4, acc));
    // The standard error of a mean of zeros and ones.
    assert!((found.accuracy.acc.error - (acc * (1.0 - acc) / 3.0).sqrt()).abs() < 1e-12);
    let subjects: Vec<_> =
        found.subjects.iter().map(|s| (s.subject.as_str(), s.accuracy.questions)).collect();
    assert_eq!(subjects, [("openings", 1), ("manners", 2)]);
}

#[test]
fn what_choices_share_runs_once() {
    let found = ask(None);
    let questions = Question::parse_jsonl(QUESTIONS).unwrap();
    let anew: usize = questions
        .iter()
        .map(|question| {
            let encoded = Encoded::new(question, &MODEL.1, None).unwrap();
            (0..question.choices.len()).map(|i| encoded.tokens(i).0.len() - 1).sum::<usize>()
        })
        .sum();
    assert!((found.tokens as usize) < anew * 2 / 3, "{} of {anew}", found.tokens);
}

#[test]
fn a_choice_that_melts_into_the_prompt() {
    // The prompt's last token is the space, which `much` takes into its own.
    let line = r#"{"prompt": "She was very ", "choices": ["much obliged", "\t."], "answer": 0}"#;
    let question = &Question::parse_jsonl(line).unwrap()[0];
    let encoded = Encoded::new(question, &MODEL.1, None).unwrap();
    let (tokens, scored) = encoded.tokens(0);
    let prompt = MODEL.1.encode("She was very ", false, false).unwrap();
    assert!(scored.start < prompt.len(), "the case is not tested by this vocabulary");
    assert_eq!(tokens, MODEL.1.encode("She was very much obliged", false, false).unwrap());
    // Both are scored from the same place, and all of their text is.
    let (other, other_scored) = encoded.tokens(1);
    assert_eq!(other_scored.start, scored.start);
    assert_eq!(MODEL.1.decode(other, false), "She was very \t.");
    assert_eq!(tokens[..scored.start], other[..scored.start]);
}

#[test]
fn through_a_chat_template() {
    let template = ChatTemplate::new(CHATML, SpecialTexts::default()).unwrap();
    let found = ask(Some(&template));
    let prompt = "<|im_start|>user\nWhat is a gentleman?<|im_end|>\n<|im_start|>assistant\n";
    let encode = |text: &str| MODEL.1.encode(text, false, true).unwrap();
    let expected = naive(&encode(prompt), &encode(&format!("{prompt}Ten.")));
    assert!((found.answers[2].log_likelihoods[1] - expected).abs() < 1e-3);
}

#[test]
fn agreement_with_another_model() {
    let base = ask(None);
    let itself = base.agreement(&base);
    assert_eq!((itself.acc.value, itself.acc_norm.value), (1.0, 1.0));
    assert_eq!((itself.acc_difference.value, itself.acc_difference.error), (0.0, 0.0));
    // Half of the answers turned round.
    let mut other = base.clone();
    for answer in &mut other.answers[..2] {
        answer.chosen =
            if answer.chosen == answer.answer { 1 - answer.chosen.min(1) } else { answer.answer };
    }
    let agreement = other.agreement(&base);
    assert_eq!((agreement.acc.value, agreement.acc_norm.value), (0.5, 1.0));
    let right = |c: &Choices| c.answers.iter().filter(|a| a.chosen == a.answer).count() as f64;
    assert_eq!(agreement.acc_difference.value, (right(&other) - right(&base)) / 4.0);
}

#[test]
fn a_context_that_is_too_small_names_the_question() {
    let questions = Question::parse_jsonl(QUESTIONS).unwrap();
    let config = ChoicesConfig { context: Some(8), ..CONFIG };
    let error =
        config.run(&MODEL.0, &MODEL.1, &MODEL.2, &questions, None, &mut |_| ()).unwrap_err();
    assert!(matches!(&error, Error::Question { line: 2 | 3, .. }), "{error}");
    assert!(error.to_string().contains("more than 8 tokens"), "{error}");
}

#[test]
fn lines_that_are_no_questions() {
    #[track_caller]
    fn check(line: &str, expected: &str) {
        let text =
            format!("{{\"prompt\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 1}}\n\n{line}");
        let error = Question::parse_jsonl(&text).unwrap_err().to_string();
        assert!(error.starts_with("line 3: ") && error.contains(expected), "{error}");
    }
    check("{", "EOF");
    check("[]", "column");
    check(r#"{"choices": ["a", "b"], "answer": 0}"#, "neither `question` nor `prompt`");
    check(r#"{"question": "q", "prompt": "p", "choices": ["a", "b"], "answer": 0}"#, "both");
    check(r#"{"question": "q", "answer": 0}"#, "`choices`");
    check(r#"{"question": "q", "choices": ["a"], "answer": 0}"#, "has 1 entries");
    check(r#"{"question": "q", "choices": ["a", " "], "answer": 0}"#, "choice 1 is empty");
    check(r#"{"question": "q", "choices": ["a", "b"]}"#, "`answer`");
    for answer in ["2", "-1", "0.5", "\"C\"", "\"AB\"", "\"\"", "null", "[0]"] {
        let line = format!(r#"{{"question": "q", "choices": ["a", "b"], "answer": {answer}}}"#);
        check(&line, "expected a number from 0 to 1 or a letter from A to B");
    }
    let error = Question::parse_jsonl(" \n").unwrap_err().to_string();
    assert!(error.contains("there is no question"), "{error}");

    let empty = r#"{"prompt": "", "choices": ["a", "b"], "answer": 0}"#;
    let question = &Question::parse_jsonl(empty).unwrap()[0];
    assert_eq!(question.ask, Ask::Prompt(String::new()));
    let error = Encoded::new(question, &MODEL.1, None).unwrap_err().to_string();
    assert!(error.contains("nothing stands before the choices"), "{error}");
}
