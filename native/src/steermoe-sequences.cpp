#include "steermoe-sequences.h"

#include "ggml.h"
#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include "steermoe-error.h"
#include "steermoe-rows.h"
#include "steermoe-ubatch.h"

#include <algorithm>
#include <utility>

namespace {

bool is_empty(const steermoe_bias & bias) {
    for (int32_t il = 0; il < bias.n_layer; il++) {
        if (!bias.layer_is_zero(il)) {
            return false;
        }
    }
    return true;
}

bool is_equal(const steermoe_bias & a, const steermoe_bias & b) {
    const steermoe_edit edit = steermoe_edit_of(a);
    if (edit != steermoe_edit_of(b) || a.n_layer != b.n_layer) {
        return false;
    }
    if ((edit != STEERMOE_EDIT_SOFT && a.epsilon != b.epsilon) || (edit == STEERMOE_EDIT_CAPPED && a.cap != b.cap)) {
        return false;
    }
    for (int32_t il = 0; il < a.n_layer; il++) {
        const bool zero = a.layer_is_zero(il);
        if (zero != b.layer_is_zero(il) || (!zero && a.layers[il] != b.layers[il])) {
            return false;
        }
    }
    return true;
}

// The edit that each layer of a bias needs.
std::vector<steermoe_edit> edits_of(const steermoe_bias & bias) {
    std::vector<steermoe_edit> edits((size_t) bias.n_layer);
    for (int32_t il = 0; il < bias.n_layer; il++) {
        edits[il] = bias.layer_is_zero(il) ? STEERMOE_EDIT_NONE : steermoe_edit_of(bias);
    }
    return edits;
}

// Rows of a bank that needs n: a power of two, so that it is seldom replaced.
int32_t capacity(int32_t n) {
    int32_t rows = 2;
    while (rows < n) {
        rows *= 2;
    }
    return rows;
}

// Graphs of at most FEW_TOKENS tokens, which may take less time to compute than to build, keep an edit for KEPT_GRAPHS.
constexpr uint32_t FEW_TOKENS  = 32;
constexpr uint64_t KEPT_GRAPHS = 16;

} // namespace

steermoe_sequences::steermoe_sequences(const llama_model & model)
    : model(model), seqs(LLAMA_MAX_SEQ), rows(STEERMOE_MAX_ROWS) {}

steermoe_sequences::~steermoe_sequences() = default;

//
// changes
//

bool steermoe_sequences::attach(const steermoe_bias & bias, const layers_t & layers) {
    return set(context, true, &bias, layers);
}

bool steermoe_sequences::attach_seq(int32_t seq, const steermoe_bias * bias, const layers_t & layers) {
    return set(seqs.at(seq), true, bias, layers);
}

bool steermoe_sequences::detach_seq(int32_t seq) {
    return set(seqs.at(seq), false, nullptr, {});
}

bool steermoe_sequences::attach_row(int32_t row, const steermoe_bias & bias, const layers_t & layers) {
    return set(rows.at(row), true, &bias, layers);
}

bool steermoe_sequences::detach_row(int32_t row) {
    return set(rows.at(row), false, nullptr, {});
}

bool steermoe_sequences::detach() {
    const bool reserved = bank != nullptr;
    std::fill(seqs.begin(), seqs.end(), attachment());
    std::fill(rows.begin(), rows.end(), attachment());
    context = attachment();
    bank.reset();
    next_rows.clear();
    token_rows.clear();
    return reserved;
}

bool steermoe_sequences::set(attachment & a, bool attached, const steermoe_bias * bias, const layers_t & layers) {
    if (bias == nullptr || is_empty(*bias)) {
        a = { attached, nullptr };
        return false;
    }
    if (std::shared_ptr<steering> equal = find(*bias)) {
        a = { attached, equal };
        return false;
    }

    const bool                     last    = a.to != nullptr && a.to.use_count() == 1; // nothing else needs its row
    const std::vector<steering *>  stay    = steerings(last ? &a : nullptr);
    const auto                     next    = std::make_shared<steering>(steering{ *bias, ::edits_of(*bias), 0 });
    const auto                     n_row   = (int32_t) stay.size() + 2; // with the unsteered one and the new one
    const steermoe_edit            before  = bank == nullptr ? STEERMOE_EDIT_NONE : bank->largest;
    const steermoe_edit            largest = std::max({ before, STEERMOE_EDIT_HARD, steermoe_edit_of(*bias) });
    std::unique_ptr<steermoe_bank> grown;
    if (largest != before || n_row > bank->n_rows) {
        const int32_t n_rows = std::max(bank == nullptr ? 0 : bank->n_rows, capacity(n_row));
        grown = std::make_unique<steermoe_bank>(model, layers, (int32_t) model.hparams.n_expert, n_rows, largest);
    }

    // from here on nothing fails
    if (grown != nullptr) {
        bank = std::move(grown);
        topology++; // graphs of the old bank read its tables
        for (steering * s : stay) {
            bank->write(s->row, s->bias);
        }
    }
    next->row = last ? a.to->row : free_row(stay);
    bank->write(next->row, next->bias);
    a = { attached, next };
    return largest != before; // the graphs reserved with a bank are the largest that any of its rows needs
}

// The first row of the bank that no steering has.
int32_t steermoe_sequences::free_row(const std::vector<steering *> & all) const {
    std::vector<bool> taken((size_t) bank->n_rows);
    taken[steermoe_bank::UNSTEERED] = true;
    for (const steering * s : all) {
        taken[s->row] = true;
    }
    return (int32_t) (std::find(taken.begin(), taken.end(), false) - taken.begin());
}

std::shared_ptr<steermoe_sequences::steering> steermoe_sequences::find(const steermoe_bias & bias) const {
    if (context.to != nullptr && is_equal(context.to->bias, bias)) {
        return context.to;
    }
    for (const std::vector<attachment> * all : { &seqs, &rows }) {
        for (const attachment & a : *all) {
            if (a.to != nullptr && is_equal(a.to->bias, bias)) {
                return a.to;
            }
        }
    }
    return nullptr;
}

std::vector<steermoe_sequences::steering *> steermoe_sequences::steerings(const attachment * without) const {
    std::vector<steering *> all;
    std::vector<bool>       seen((size_t) (bank == nullptr ? 0 : bank->n_rows));
    const auto              add = [&](const attachment & a) {
        if (&a != without && a.to != nullptr && !seen[a.to->row]) {
            seen[a.to->row] = true;
            all.push_back(a.to.get());
        }
    };
    add(context);
    std::for_each(seqs.begin(), seqs.end(), add);
    std::for_each(rows.begin(), rows.end(), add);
    return all;
}

bool steermoe_sequences::steers(int il) const {
    const std::vector<steering *> all = steerings();
    return std::any_of(all.begin(), all.end(), [&](const steering * s) { return s->edits[il] != STEERMOE_EDIT_NONE; });
}

const steermoe_sequences::steering * steermoe_sequences::steering_of(int32_t seq) const {
    const attachment & a = seqs[seq];
    return a.attached ? a.to.get() : context.to.get();
}

//
// batches
//

void steermoe_sequences::set_token_rows(const int32_t * given, int32_t n_tokens) {
    std::vector<int32_t> next(given, given + n_tokens);

    const std::string obstacle = obstacle_of_rows(next);
    if (!obstacle.empty()) {
        throw steermoe_error(STEERMOE_ERR_ARGUMENT, obstacle);
    }
    next_rows = std::move(next);
}

std::string steermoe_sequences::begin_batch(const llama_batch * batch) {
    token_rows.clear(); // of a batch that was not computed to its end
    std::vector<int32_t> given = std::exchange(next_rows, {});
    if (batch == nullptr) {
        return "";
    }
    if (given.empty()) {
        return obstacle_of_sequences(*batch);
    }
    if (given.size() != (size_t) batch->n_tokens) {
        return "steering: " + std::to_string(given.size()) + " rows were given for a batch of " +
               std::to_string(batch->n_tokens) + " tokens; give each token of the next batch one";
    }
    const std::string obstacle = obstacle_of_rows(given); // rows may have been detached
    if (!obstacle.empty()) {
        return "steering: " + obstacle;
    }
    token_rows = std::move(given);
    n_waiting  = token_rows.size();
    return "";
}

std::string steermoe_sequences::obstacle_of_rows(const std::vector<int32_t> & given) const {
    for (size_t i = 0; i < given.size(); i++) {
        const int32_t row = given[i];
        if (row < -1 || row >= STEERMOE_MAX_ROWS || (row >= 0 && !rows[row].attached)) {
            const bool exists = row >= 0 && row < STEERMOE_MAX_ROWS;
            return "token " + std::to_string(i) + " of the batch has row " + std::to_string(row) +
                   (exists ? ", to which no bias is attached (steermoe_row_attach)"
                           : "; rows are 0 to " + std::to_string(STEERMOE_MAX_ROWS - 1) + ", and -1 for unsteered");
        }
    }
    return "";
}

std::string steermoe_sequences::obstacle_of_sequences(const llama_batch & batch) const {
    for (int32_t i = 0; bank != nullptr && i < batch.n_tokens; i++) {
        for (int32_t s = 1; s < batch.n_seq_id[i]; s++) {
            const auto [a, b] = std::minmax(batch.seq_id[i][0], batch.seq_id[i][s]);
            if (steering_of(a) != steering_of(b)) {
                return "steering: token " + std::to_string(i) + " of the batch belongs to the sequences " +
                       std::to_string(a) + " and " + std::to_string(b) +
                       ", which are steered differently; give each a token of its own";
            }
        }
    }
    return "";
}

//
// graphs
//

// Without rows the sequences of a token have one steering, see obstacle_of_sequences(): the first sequence tells it.
std::vector<const steermoe_sequences::steering *> steermoe_sequences::steerings_of(const llama_ubatch & ubatch) const {
    std::vector<const steering *> all(ubatch.n_tokens);
    if (token_rows.empty()) {
        for (uint32_t i = 0; i < ubatch.n_tokens; i++) {
            all[i] = steering_of(ubatch.seq_id[i][0]);
        }
    } else {
        const std::vector<int32_t> mine = steermoe_values_of(ubatch, token_rows, -1);
        for (uint32_t i = 0; i < ubatch.n_tokens; i++) {
            all[i] = mine[i] < 0 ? nullptr : rows[mine[i]].to.get();
        }
    }
    return all;
}

std::vector<int32_t> steermoe_sequences::rows_of(const llama_ubatch & ubatch) const {
    std::vector<int32_t> bank_rows;
    for (const steering * s : steerings_of(ubatch)) {
        bank_rows.push_back(s == nullptr ? steermoe_bank::UNSTEERED : s->row);
    }
    return bank_rows;
}

void steermoe_sequences::end_inputs(const llama_ubatch & ubatch) {
    n_waiting -= std::min<size_t>(n_waiting, ubatch.n_tokens);
    if (n_waiting == 0) {
        token_rows.clear();
    }
}

steermoe_sequences::edits_t steermoe_sequences::edits_of(const llama_ubatch & ubatch) const {
    edits_t           all;
    std::vector<bool> seen((size_t) bank->n_rows);
    for (const steering * s : steerings_of(ubatch)) {
        if (s == nullptr || seen[s->row]) {
            continue;
        }
        seen[s->row] = true;
        all.resize(s->edits.size());
        for (size_t il = 0; il < all.size(); il++) {
            all[il] = std::max(all[il], s->edits[il]);
        }
    }
    return all;
}

// Rows may steer the tokens of an answer in turns. So that this does not build a graph for each token, a graph has what one
// of the last ones of its size needed, too: edits that no token's row asks for change no bit.
steermoe_sequences::edits_t steermoe_sequences::with_recent(const edits_t & next, uint32_t n_tokens) {
    const size_t n_layer = model.hparams.n_layer();
    if (lately.n_tokens != n_tokens) {
        lately = { n_tokens, 0, {} };
        lately.last.resize(n_layer);
    }
    lately.n_graph++;
    edits_t all(n_layer, STEERMOE_EDIT_NONE);
    bool    any = false;
    for (size_t il = 0; il < n_layer; il++) {
        lately.last[il][next.empty() ? STEERMOE_EDIT_NONE : next[il]] = lately.n_graph;
        for (int edit = STEERMOE_EDIT_SOFT; edit <= STEERMOE_EDIT_CAPPED; edit++) {
            const uint64_t last = lately.last[il][edit];
            if (last != 0 && lately.n_graph - last < KEPT_GRAPHS) {
                all[il] = (steermoe_edit) edit;
                any     = true;
            }
        }
    }
    return any ? all : edits_t();
}

uint64_t steermoe_sequences::begin_graph(const llama_ubatch * ubatch) {
    edits_t next;
    if (bank != nullptr && ubatch != nullptr) {
        next = edits_of(*ubatch);
    } else if (bank != nullptr) {
        next.assign(model.hparams.n_layer(), bank->largest);
    }
    if (bank != nullptr && ubatch != nullptr && !token_rows.empty() && ubatch->n_tokens <= FEW_TOKENS) {
        next = with_recent(next, ubatch->n_tokens);
    } else {
        lately.n_tokens = 0;
    }
    if (next != edits) {
        edits = std::move(next);
        topology++;
    }
    input = nullptr;
    return topology;
}

ggml_tensor * steermoe_sequences::edit_logits(ggml_context * ctx, llm_graph_result * res, ggml_tensor * logits,
                                              int il) {
    if (edits.empty() || edits[il] == STEERMOE_EDIT_NONE) {
        return logits;
    }
    if (input == nullptr) {
        input = static_cast<steermoe_rows_input *>(res->add_input(std::make_unique<steermoe_rows_input>(*this)));
    }
    ggml_build_forward_expand(res->get_gf(), logits); // before all nodes of the edit, see steermoe_bank::edit_logits
    return bank->edit_logits(ctx, logits, il, edits[il], input->of_tokens(ctx, logits->ne[1]));
}

ggml_tensor * steermoe_sequences::edit_selection(ggml_context * ctx, ggml_tensor * scores, int il) {
    if (edits.empty() || edits[il] == STEERMOE_EDIT_NONE) {
        return scores;
    }
    return bank->edit_selection(ctx, scores, il, edits[il], input->of_tokens(ctx, scores->ne[1]));
}

uint32_t steermoe_sequences::n_nodes() const {
    return bank != nullptr ? bank->n_nodes() : 0;
}
