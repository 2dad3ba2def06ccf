#include "steermoe-sequences.h"

#include "ggml.h"
#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include "steermoe-rows.h"

#include <algorithm>

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

} // namespace

steermoe_sequences::steermoe_sequences(const llama_model & model) : model(model), seqs(LLAMA_MAX_SEQ) {}

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

bool steermoe_sequences::detach() {
    const bool reserved = bank != nullptr;
    std::fill(seqs.begin(), seqs.end(), attachment());
    context = attachment();
    bank.reset();
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
    for (const attachment & a : seqs) {
        if (a.to != nullptr && is_equal(a.to->bias, bias)) {
            return a.to;
        }
    }
    return nullptr;
}

std::vector<steermoe_sequences::steering *> steermoe_sequences::steerings(const attachment * without) const {
    std::vector<steering *> all;
    const auto              add = [&](const attachment & a) {
        if (&a != without && a.to != nullptr && std::find(all.begin(), all.end(), a.to.get()) == all.end()) {
            all.push_back(a.to.get());
        }
    };
    add(context);
    std::for_each(seqs.begin(), seqs.end(), add);
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

std::string steermoe_sequences::obstacle(const llama_batch & batch) const {
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

// The sequences of a token have one steering, see obstacle(): the first sequence tells it.
std::vector<int32_t> steermoe_sequences::rows_of(const llama_ubatch & ubatch) const {
    std::vector<int32_t> rows(ubatch.n_tokens, steermoe_bank::UNSTEERED);
    for (uint32_t i = 0; i < ubatch.n_tokens; i++) {
        if (const steering * s = steering_of(ubatch.seq_id[i][0])) {
            rows[i] = s->row;
        }
    }
    return rows;
}

steermoe_sequences::edits_t steermoe_sequences::edits_of(const llama_ubatch & ubatch) const {
    edits_t           all;
    std::vector<bool> seen((size_t) bank->n_rows);
    for (uint32_t i = 0; i < ubatch.n_tokens; i++) {
        const steering * s = steering_of(ubatch.seq_id[i][0]);
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

uint64_t steermoe_sequences::begin_graph(const llama_ubatch * ubatch) {
    edits_t next;
    if (bank != nullptr && ubatch != nullptr) {
        next = edits_of(*ubatch);
    } else if (bank != nullptr) {
        next.assign(model.hparams.n_layer(), bank->largest);
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
